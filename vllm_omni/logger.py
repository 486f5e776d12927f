"""One logger tree named `vllm_omni`; level from VLLM_OMNI_LOG_LEVEL. Knows nothing of what is logged."""

from __future__ import annotations

import logging

from vllm_omni import envs


def init_logger(name: str) -> logging.Logger:
    """The logger of a module; the first call gives the tree its handler, unless the application set one."""
    root = logging.getLogger("vllm_omni")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(envs.log_level())
    return logging.getLogger(name)
