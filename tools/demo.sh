#!/usr/bin/env bash
# Sets the checkout up if need be and runs the demo; arguments go to tools/demo.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh --demo

export OMP_WAIT_POLICY=PASSIVE # idle OpenMP threads sleep: spinning ones cost up to 50x on a shared machine
export HF_HUB_OFFLINE=1
exec .venv/bin/python tools/demo.py "$@"
