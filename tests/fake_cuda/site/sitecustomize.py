"""In an engine process that has this folder on its PYTHONPATH: the fake devices, as the variables say.

- FAKE_CUDA_LOST: `KERNELS` or `KERNELS:FILE`: the device is lost after so many kernels; with a file, in the one process
  alone that makes it
- FAKE_CUDA_LIMIT: bytes of device 0
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if "vllm_omni.engine.process" in sys.orig_argv:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import fake_cuda

    stay = fake_cuda.installed()
    stay.__enter__()
    if "FAKE_CUDA_LIMIT" in os.environ:
        limit = fake_cuda.limit(int(os.environ["FAKE_CUDA_LIMIT"]))
        limit.__enter__()
    kernels, _, once = os.environ.get("FAKE_CUDA_LOST", "").partition(":")
    if kernels:
        with suppress(FileExistsError):
            if once:
                Path(once).touch(exist_ok=False)
            fake_cuda.device.kernels_left = int(kernels)
