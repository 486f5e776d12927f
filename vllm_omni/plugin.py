"""The door without `--omni`: vLLM calls `register` before it parses, and a diffusion model is handed over to us.

An entry of the group `vllm.general_plugins`. vLLM loads those in every process, engine and workers included; only
`vllm serve` in the main process is ours, and only with a flag that vLLM does not have, or a diffusers model folder.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

OUR_FLAGS = frozenset({"--cache-backend", "--cache-config", "--vae-use-tiling", "--vae-use-slicing", "--ui"})


def is_ours(arguments: Sequence[str]) -> bool:
    """Whether the command line (without the program's name) asks `vllm serve` for a diffusion model."""
    if list(arguments[:1]) != ["serve"]:
        return False
    flags = {word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    model = next((word for word in arguments[1:] if not word.startswith("-")), None)
    return bool(flags & OUR_FLAGS) or (model is not None and (Path(model) / "model_index.json").is_file())


def register() -> None:
    """Called by vLLM. Where the command is ours it does not return."""
    if multiprocessing.parent_process() is None and is_ours(sys.argv[1:]):
        from vllm_omni.entrypoints.cli.main import main

        sys.exit(main())
