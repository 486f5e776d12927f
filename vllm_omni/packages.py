"""Which installed packages clash with this one, and what to do about it. Reads their metadata, imports none of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

REFERENCE = "vllm-omni"  # another distribution that owns the import name `vllm_omni`
OURS = "vllm-omni-magcache"
UNLOADABLE_WITH_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def conflict() -> str | None:
    """What to do about the reference package if it is installed beside ours; None if it is not."""
    try:
        found = distribution(REFERENCE).version
    except PackageNotFoundError:
        return None
    return (
        f"{REFERENCE} {found} is installed beside {OURS}, and both own the import name vllm_omni: files of one lie "
        f"over the other's. Run: pip uninstall -y {REFERENCE} {OURS} && pip install {OURS}"
    )


def unloadable() -> list[str]:
    """Of torchvision, torchaudio and torchcodec, those whose CUDA build cannot load with the CPU torch installed.

    Reads their version files: importing them is what fails.
    """
    torch_cuda = _version_file("torch")
    if torch_cuda is None or cuda_of(torch_cuda) is not None:
        return []
    found = ((name, _version_file(name)) for name in UNLOADABLE_WITH_CPU_TORCH)
    return [name for name, text in found if text is not None and cuda_of(text) is not None]


def hide_unloadable() -> list[str]:
    """Make those packages look absent to everything imported later: transformers and diffusers then do without."""
    hidden = unloadable()
    for name in hidden:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what the import system documents for "absent"
    return hidden


def cuda_of(version_file: str) -> str | None:
    """What a version.py of the torch family says of its build: "13.0", say, or None for `cuda = None`."""
    found = re.search(r"^cuda\s*(?::[^=]*)?=\s*(.+)$", version_file, re.MULTILINE)
    return None if found is None or found[1].strip() == "None" else found[1].strip().strip("'\"")


def _version_file(name: str) -> str | None:
    """The text of a package's version.py, found without importing the package."""
    if name in sys.modules and sys.modules[name] is None:  # hidden already
        return None
    spec = importlib.util.find_spec(name)
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin is not None else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None
