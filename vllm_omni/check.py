"""`python -m vllm_omni.check`: what is installed, what is missing, what stands in the way, and how to mend it."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

REFERENCE = "vllm-omni"  # another distribution that owns the import name `vllm_omni`
OURS = "vllm-omni-magcache"
BROKEN_WITH_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def rival() -> str | None:
    """What to do about the reference package where it is installed beside ours; None where it is not."""
    try:
        found = distribution(REFERENCE).version
    except PackageNotFoundError:
        return None
    return (
        f"{REFERENCE} {found} is installed beside {OURS}, and both own the import name vllm_omni: files of one lie "
        f"over the other's. Run: pip uninstall -y {REFERENCE} {OURS} && pip install {OURS}"
    )


def cuda_builds_beside_cpu_torch() -> list[str]:
    """Of torchvision, torchaudio and torchcodec, those whose CUDA build cannot load with the CPU torch installed.

    Reads their version files: importing them is what fails.
    """
    torch_cuda = _version_file("torch")
    if torch_cuda is None or _is_cuda(torch_cuda):
        return []
    return [name for name in BROKEN_WITH_CPU_TORCH if (text := _version_file(name)) is not None and _is_cuda(text)]


def hide_broken_packages() -> list[str]:
    """Make those packages look absent to everything imported later: transformers and diffusers then do without."""
    hidden = cuda_builds_beside_cpu_torch()
    for name in hidden:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what the import system documents for "absent"
    return hidden


def _version_file(name: str) -> str | None:
    """The text of a package's version.py, found without importing the package."""
    if name in sys.modules and sys.modules[name] is None:  # hidden already
        return None
    spec = importlib.util.find_spec(name)
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin is not None else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None


def _is_cuda(text: str) -> bool:
    """Whether a version.py of the torch family says cuda = '13.0', say, and not cuda = None."""
    found = re.search(r"^cuda\s*(?::[^=]*)?=\s*(.+)$", text, re.MULTILINE)
    return found is not None and found[1].strip() != "None"


def report() -> tuple[list[str], list[str]]:
    """(facts, problems), a line each."""
    from vllm_omni._vllm_compat import INSTALL_HINT, installed

    facts, problems = [], []
    for name in (OURS, "torch", "diffusers", "transformers", "greenlet", "pydantic", "imageio", "peft", "cache-dit"):
        try:
            facts.append(f"{name:20} {version(name)}")
        except PackageNotFoundError:
            facts.append(f"{name:20} not installed")
    vllm = installed()
    facts.append(f"{'vllm':20} {vllm or 'not installed'}")
    if vllm is None:
        problems.append(f"`vllm serve` and `vllm-omni serve` need vLLM; {INSTALL_HINT}")
    elif not vllm.startswith("0.32"):
        problems.append(f"vLLM {vllm} is untried; this version is written for 0.32")
    if (message := rival()) is not None:
        problems.append(message)
    for name in cuda_builds_beside_cpu_torch():
        problems.append(
            f"{name} is a CUDA build beside a CPU build of torch and cannot be imported. What runs through vllm_omni "
            f"hides it; plain `vllm serve` fails. Run: pip uninstall -y {name}"
        )
    return facts, problems


def main() -> int:
    """Print the report; 1 where something stands in the way."""
    facts, problems = report()
    print("\n".join(facts))
    print("\n".join(f"problem: {line}" for line in problems) or "nothing stands in the way")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
