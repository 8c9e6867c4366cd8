#!/usr/bin/env bash
# What works on this GPU, how fast, and where the host waits for it. Installs nothing; --help says more.
#   bash tools/gpu_check.sh [--out FOLDER] [--device cuda|cpu] [--preset wan-1.3b|tiny] [--golden FILE] [--steps a,b]
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/tools/gpu_check.py" "$@"
