#!/usr/bin/env bash
# From a fresh clone to a first comparison: needs Python and pip only.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=""
source tools/environment.sh
echo "== comparing five cache policies on the embedded model"
"$venv/bin/lightning-kv" evaluate -c configs/quickstart.yaml "$@"
