"""Compiles device.cpp once per source, torch and compiler: some ten seconds; then it is found in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
COMPILERS = ("c++", "g++", "clang++")


class CannotBuildError(RuntimeError):
    """Why there is no fake device here."""


def library() -> Path:
    """The compiled device; CannotBuildError says what is missing."""
    if torch.version.cuda is not None:
        raise CannotBuildError(f"torch is built for CUDA {torch.version.cuda}: the real device's key is taken")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise CannotBuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path")
    packages = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-isystem{packages / part}" for part in ("include", "include/torch/csrc/api/include")]
    identity = "\0".join([SOURCE.read_text(encoding="utf-8"), torch.__version__, compiler, *flags])
    place = _cache() / hashlib.sha256(identity.encode()).hexdigest()[:16]
    built = place / "libfake_cuda.so"
    if not built.exists():
        place.mkdir(parents=True, exist_ok=True)
        draft = place / f"draft.{os.getpid()}.so"  # moved when it is whole: several test processes may build at once
        links = [str(packages / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")]
        run = subprocess.run([compiler, *flags, str(SOURCE), *links, "-o", str(draft)], capture_output=True, text=True)
        if run.returncode:
            raise CannotBuildError(f"{compiler} does not compile device.cpp: {run.stderr.strip()[:2000]}")
        draft.replace(built)
    return built


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-omni" / "fake_cuda"


if __name__ == "__main__":
    print(library())
