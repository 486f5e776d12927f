#!/usr/bin/env bash
# All checks, the same here and in CI: ruff, mypy, pytest. Two files of tests run at a time, with a thread each; those
# that measure time or memory (marked alone) follow one by one, with as many threads as there are cores. A few tests
# that failed are tried once more, with nothing beside them; what passes then is named as flaky, and is no failure.
# With `--fast`, the tests marked slow are left out; with `--full` there are some more. With `--gpu`: the full set on the
# fake CUDA device and no other, a quarter of an hour. With other arguments: only pytest, with those arguments.
# With VLLM_OMNI_TESTS_S, the seconds that there are for all of it, slow tests are left out as soon as no time is left
# but for the others, and in the end those, too; how many is said. Where the set-up takes longer, so will the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
pace=$((SECONDS * 100 / 135)) # per cent of the seconds that the figures below were measured with
pace=$((pace < 100 ? 100 : pace > 250 ? 250 : pace))

export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bin=.venv/bin
retried=60 # more failures than this are no accident

# The tests that failed in the last run with this cache, one a line.
failures() {
    local found=$1/v/cache/lastfailed
    [[ ! -f $found ]] || "$bin/python" -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' "$found" | sort
}

# lane NAME MARKS PATHS -- OPTIONS: tests of those marks, with the options; what failed once more, without them.
lane() {
    local name=$1 marks=$2 paths=() status=0 failed again flaky
    shift 2
    while [[ $1 != -- ]]; do paths+=("$1"); shift; done
    shift
    local cache=.pytest_cache/$name
    rm -rf "$cache"
    local pytest=("$bin/python" -m pytest -o "cache_dir=$cache" -m "$marks" "${paths[@]}")
    "${pytest[@]}" "$@" || status=$?
    [[ $status -ne 0 ]] || return 0
    failed=$(failures "$cache")
    # 1: tests failed. Anything else is no test's affair, nor is a file that cannot be collected, which has no "::".
    if [[ $status -ne 1 || -z $failed ]] || grep -qv :: <<<"$failed" || [[ $(wc -l <<<"$failed") -gt $retried ]]; then
        return 1
    fi
    printf 'once more, alone (%s):\n%s\n' "$name" "$failed"
    status=0
    env -u VLLM_OMNI_TESTS_UNTIL -u VLLM_OMNI_TESTS_END \
        "${pytest[@]}" --last-failed --last-failed-no-failures none || status=$?  # left out is not passed
    again=$(failures "$cache")
    flaky=$(comm -23 <(printf '%s\n' "$failed") <(printf '%s\n' "$again"))
    [[ -z $flaky || $status -gt 1 ]] || sed 's/^/flaky: /; s/$/ (failed once, passed alone)/' <<<"$flaky"
    return "$status"
}

# leave SLOW ALL: slow tests are left out when so many seconds are left, on a machine of usual speed; then all.
leave() {
    [[ -n ${VLLM_OMNI_TESTS_S:-} ]] || return 0
    local end=$(($(date +%s) - SECONDS + VLLM_OMNI_TESTS_S))
    export VLLM_OMNI_TESTS_UNTIL=$((end - $1 * pace / 100)) VLLM_OMNI_TESTS_END=$((end - $2 * pace / 100))
}

but_slow=""
if [[ ${1:-} == --fast ]]; then
    but_slow=" and not slow"
    shift
fi
if [[ ${1:-} == --full ]]; then
    export VLLM_OMNI_TESTS=all
    shift
fi
if [[ ${1:-} == --gpu ]]; then
    export VLLM_OMNI_FAKE_CUDA=all OMP_NUM_THREADS=1
    tests=(tests/fake_cuda tests/test_gpu_check.py)
    lane gpu "not alone" "${tests[@]}" -- -n 2 --dist load -rP && lane gpu-alone alone "${tests[@]}" -- && exit 0
    exit 1
fi
if [[ $# -ne 0 ]]; then
    exec "$bin/python" -m pytest "$@"
fi

failed=()
# What fails does not keep the rest from running, so that one run shows everything.
"$bin/ruff" check . || failed+=(ruff)
"$bin/mypy" vllm_omni || failed+=(mypy)
leave 420 150
OMP_NUM_THREADS=1 lane parallel "not alone$but_slow" -- -n 2 --dist loadfile || failed+=(pytest)
leave 120 30
lane alone "alone$but_slow" -- || failed+=("pytest, tests alone")
[[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
