"""The package built from source, beside a CUDA toolkit and without one: cached requests run on the fake device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cuda")]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "vllm_omni")
TOOLKITS = (Path("/usr/local/cuda/bin"), Path("/usr/local/cuda-13.0/bin"))
SERVED = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != "ScikitBuildRedirectingFinder"]
from pipelines import CURVE, DEFAULTS, embeds, tiny_flux
import fake_cuda
import vllm_omni
from vllm_omni import Omni, OmniDiffusionSamplingParams as Params
from vllm_omni.kernels.ops import REASON
assert vllm_omni.__file__.startswith(sys.argv[1]), vllm_omni.__file__
with fake_cuda.installed():
    cache = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}
    for dtype in ("float32", "bfloat16"):
        import torch
        pipeline = tiny_flux().to("cuda", getattr(torch, dtype))
        with Omni.from_pipe(pipeline, defaults=DEFAULTS, **cache) as omni:
            given = [{k: v.to(getattr(torch, dtype)) for k, v in embeds(i).items()} for i in range(3)]
            outputs = omni.generate(given, Params(num_inference_steps=8, seed=0, output_type="latent"), use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
            assert output.skipped_steps > 0 and output.latents.is_cuda
print("native:", REASON or "built")
"""


def path_with(toolkit: Path | None) -> str:
    """PATH with this toolkit's compiler, or with none."""
    left = [entry for entry in os.environ["PATH"].split(os.pathsep) if not (Path(entry) / "nvcc").exists()]
    return os.pathsep.join([str(toolkit), *left] if toolkit is not None else left)


@pytest.mark.parametrize("toolkit", [True, False], ids=["nvcc", "no nvcc"])
@pytest.mark.parametrize("isolated", [False, True], ids=["with this torch", "isolated"])
def test_it_builds_and_serves(isolated: bool, toolkit: bool, tmp_path: Path) -> None:
    nvcc = next((folder for folder in TOOLKITS if (folder / "nvcc").exists()), None)
    if toolkit and nvcc is None:
        pytest.skip("no CUDA toolkit on this machine")
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    environment = os.environ | {"PATH": path_with(nvcc if toolkit else None), "MAX_JOBS": "1"}
    environment |= {"CUDA_HOME": str(nvcc.parent)} if toolkit and nvcc is not None else {}
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(installed)]
    command = [*pip, *([] if isolated else ["--no-build-isolation"]), str(source)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if isolated and "No matching distribution found for scikit-build-core" in ran.stderr + ran.stdout:
        pytest.skip("no registry here, from which an isolated build gets its tools")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [str(installed), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
    environment |= {"PYTHONPATH": os.pathsep.join(found)}
    serve = [sys.executable, "-c", SERVED, str(installed)]
    served = subprocess.run(serve, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert served.returncode == 0, served.stderr[-3000:]
    said = served.stdout.strip().splitlines()[-1]
    assert said.startswith("native: torch does not import") if isolated else said == "native: built"
