"""`python -m vllm_omni`."""

import sys

from vllm_omni.entrypoints.cli.main import main

sys.exit(main())
