"""`python -m vllm_omni.collect_env`: what will run where on this machine, and what stands in the way."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_omni import packages
from vllm_omni._vllm_compat import INSTALL_HINT, TRIED, installed
from vllm_omni.driver import architecture_problem, device_problem, dotted, driver_cuda

LISTED = ("torch", "diffusers", "transformers", "greenlet", "pydantic", "msgspec", "imageio", "peft", "cache-dit")
CGROUP = Path("/sys/fs/cgroup/cpu.max")


@dataclass
class Report:
    """Facts by name, and problems, each with its remedy."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report as it is printed."""
        width = max(map(len, self.facts), default=0)
        yield from (f"{name:{width}}  {fact}" for name, fact in self.facts.items())
        yield from [f"problem: {problem}" for problem in self.problems] or ["nothing stands in the way"]


def report() -> Report:
    """What is installed, which device and which threads are used, and the problems."""
    found = Report()
    found.facts["python"] = f"{platform.python_version()} on {platform.platform()}"
    for name in (packages.OURS, *LISTED):
        found.facts[name] = _version(name) or "not installed"
    vllm = installed()
    found.facts["vllm"] = vllm or "not installed"
    if vllm is None:
        found.problems.append(f"`vllm serve` and `vllm-omni serve` need vLLM; {INSTALL_HINT}")
    elif not vllm.startswith(TRIED):
        found.problems.append(f"vLLM {vllm} is untried; this version is written for {TRIED}")
    if (message := packages.conflict()) is not None:
        found.problems.append(message)
    for name in packages.unloadable():
        found.problems.append(
            f"{name} is a CUDA build beside a CPU build of torch and cannot be imported. What runs through vllm_omni "
            f"hides it; plain `vllm serve` fails. Run: pip uninstall -y {name}"
        )
    _torch(found)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch(found: Report) -> None:
    """The device, the threads and the native operations, all of which torch must be imported for."""
    packages.hide_unloadable()
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        found.problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return
    built, driver, cuda = torch.version.cuda, driver_cuda(), torch.cuda.is_available()
    found.facts["torch build"] = f"for CUDA {built}" if built else "for the CPU"
    found.facts["CUDA driver"] = f"for CUDA {dotted(driver)} and older" if driver else "none"
    found.facts["device"] = torch.cuda.get_device_name() if cuda else f"cpu, {platform.machine()}"
    for index in range(torch.cuda.device_count() if cuda else 0):
        free, total = (nbytes / 2**30 for nbytes in torch.cuda.mem_get_info(index))
        capability = torch.cuda.get_device_capability(index)
        found.facts[f"cuda:{index}"] = f"capability {dotted(capability)}, {free:.1f} of {total:.1f} GiB free"
        if (problem := architecture_problem(index, capability, torch.cuda.get_arch_list())) is not None:
            found.problems.append(problem)
    if (problem := device_problem(built, driver, cuda)) is not None:
        found.problems.append(problem)
    refused = driver is not None and not cuda  # `kernels.placement.device_for` does so
    unless = "unless --device and --dtype say otherwise"
    runs = "nothing, unless --device cpu is given" if refused else ("cuda, bfloat16" if cuda else "cpu, float32")
    found.facts["will run on"] = runs if refused else f"{runs}, {unless}"
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    found.facts["C compiler"] = compiler or "none: --no-enforce-eager needs one"
    cores, threads = usable_cores(), torch.get_num_threads()
    found.facts["cores"] = f"{cores} of {os.cpu_count()}"
    found.facts["threads"] = f"{threads} of torch; {_settings(os.environ)}"
    if not cuda and threads > cores:
        found.problems.append(f"torch would start {threads} threads on {cores} cores; set OMP_NUM_THREADS={cores}")
    from vllm_omni.kernels.ops import REASON

    found.facts["native ops"] = f"not used: {REASON}" if REASON else "built"


def _settings(environment: Mapping[str, str]) -> str:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return ", ".join(f"{name}={environment[name]}" if name in environment else f"{name} not set" for name in names)


def usable_cores(quota: Path = CGROUP) -> int:
    """Cores that this process may use: its affinity, cut to the container's quota ("200000 100000" is two cores)."""
    cores = len(os.sched_getaffinity(0))
    limit, _, period = (quota.read_text() if quota.is_file() else "max 1").partition(" ")
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))


def main() -> int:
    """Print the report; 1 if something stands in the way."""
    found = report()
    print("\n".join(found.lines()))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
