#!/usr/bin/env bash
# Lint and tests; makes its environment if there is none. --slow adds what starts many processes and
# half of long matrices, --full all of them and what takes hours; --slow -m slow runs only the former.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="[dev,wan]"
source tools/environment.sh
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# A file stays on one worker, so that what its tests share is made once; conftest.py puts long ones first.
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n auto --maxprocesses 8 \
  --dist loadfile --no-loadscope-reorder --doctest-modules lightning_kv tests "$@"
