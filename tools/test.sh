#!/usr/bin/env bash
# All checks, the same here and in CI: ruff, mypy, pytest. Two files of tests run at a time, with a thread each; those
# that measure time or memory (marked alone) follow one by one, with as many threads as there are cores.
# With `--fast`, the tests marked slow are left out. With `--gpu`: the whole set on the fake CUDA device and no other, a
# quarter of an hour. With other arguments: only pytest, with those arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bin=.venv/bin
but_slow=""
if [[ ${1:-} == --fast ]]; then
    but_slow=" and not slow"
    shift
fi
if [[ ${1:-} == --gpu ]]; then
    export VLLM_OMNI_FAKE_CUDA=all OMP_NUM_THREADS=1
    tests=(tests/fake_cuda tests/test_gpu_check.py)
    "$bin/python" -m pytest -n 2 --dist load -m "not alone" -rP "${tests[@]}" && exec "$bin/python" -m pytest -m alone "${tests[@]}"
    exit 1
fi
if [[ $# -ne 0 ]]; then
    exec "$bin/python" -m pytest "$@"
fi

failed=()
# What fails does not keep the rest from running, so that one run shows everything.
"$bin/ruff" check . || failed+=(ruff)
"$bin/mypy" vllm_omni || failed+=(mypy)
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile -m "not alone$but_slow" || failed+=(pytest)
"$bin/python" -m pytest -m "alone$but_slow" || failed+=("pytest, tests alone")
[[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
