#!/usr/bin/env bash
# All checks, the same here and in CI: ruff, mypy, pytest. With `--fast`, pytest leaves out the tests marked slow and
# runs two files at a time: three minutes on two cores. With other arguments: only pytest, with those arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bin=.venv/bin
lane=()
if [[ ${1:-} == --fast ]]; then
    lane=(-m "not slow" -n 2 --dist loadfile)
    export OMP_NUM_THREADS=1
    shift
fi
failed=()
if [[ $# -eq 0 ]]; then
    "$bin/ruff" check . || failed+=(ruff)
    "$bin/mypy" vllm_omni || failed+=(mypy)
fi
# A failure above fails this script, but only after pytest has run, so that one run shows everything.
[[ ${#failed[@]} -eq 0 ]] || echo "FAILED before pytest: ${failed[*]}"
status=0
"$bin/python" -m pytest "${lane[@]}" "$@" || status=$?
[[ $status -ne 0 || ${#failed[@]} -eq 0 ]] || status=1
exit "$status"
