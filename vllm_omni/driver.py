"""Whether an accelerator is there that torch does not use, and why. Imports no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

DRIVER = "libcuda.so.1"
NO_DEVICE = "torch is a CPU build, and there is no driver"
_NO_DRIVER = "torch is built for CUDA {}, but there is no driver, so that everything runs on the CPU; install a driver"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, as (major, minor); None without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def device_problem(built: str | None, driver: tuple[int, int] | None, available: bool) -> str | None:
    """Why an accelerator is not used although there is one, and what to do; None if nothing is wrong.

    `built`: the CUDA that torch was built for, as "13.0"; None for a CPU build. A driver runs every CUDA up to its own
    and, within a major version, newer ones.
    """
    if available or driver is None:
        return None if available or built is None else _NO_DRIVER.format(built)
    if built is None:
        return f"there is a driver for CUDA {dotted(driver)}, but torch is a CPU build; install torch for CUDA"
    if int(built.partition(".")[0]) > driver[0]:
        return (
            f"torch is built for CUDA {built}, but the driver runs {dotted(driver)} and older, so that everything "
            f"would run on the CPU; update the driver, or install torch for CUDA {driver[0]}"
        )
    return f"torch for CUDA {built} finds no device behind the driver for {dotted(driver)}; see `nvidia-smi`"


def architecture_problem(index: int, capability: tuple[int, int], built: Sequence[str]) -> str | None:
    """Why a device cannot run what torch was built for, and what to do; None if it can.

    `built`: as `torch.cuda.get_arch_list` has it: an `sm_` runs on devices of its major version from its minor one on,
    a `compute_` is compiled for any newer device at its start.
    """
    for architecture in built:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # features of one device, or of one family
        major, minor = int(digits[:-1]), int(digits[-1])
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= capability
        ):
            return None
    return (
        f"cuda:{index} has capability {dotted(capability)}, and torch is built for {', '.join(built)}: no kernel would "
        "run; install a build of torch that has it, or choose another device"
    )


def dotted(number: tuple[int, int]) -> str:
    """A version as it is written."""
    return f"{number[0]}.{number[1]}"
