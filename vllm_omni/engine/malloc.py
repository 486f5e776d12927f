"""The C library's allocator under a model on the CPU: for processes of our own, never for a library user's."""

from __future__ import annotations

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**30  # free memory at the heap's end that is not returned
LARGEST_BYTES = 32 * 2**20  # an allocation that can be reused; glibc takes no higher limit


def keep_freed_memory(device: str | None = None) -> bool:
    """Let this process keep what it frees: every forward allocates the temporaries of the last one again.

    glibc returns memory to the system at once, and its pages are cleared and mapped again in the next forward; with a
    batch of a small model that is a sixth of the time (docs/log.md). `device` is where the model goes, None for CUDA if
    there is one. Returns False if a GPU does the work, or the allocator is another one.
    """
    if (device != "cpu" and torch.cuda.is_available()) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES))


def return_freed_memory() -> None:
    """Give back to the system what this process has freed, whatever it otherwise keeps."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
