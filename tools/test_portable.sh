#!/usr/bin/env bash
# The tests as x86-64 CPUs without AVX-512 run them: once with torch's plain kernels, once with those
# for AVX2. Kernels for other instructions add up in another order, so that results differ in their
# last digits. A test that fails here and passes in tools/test.sh most likely compares two ways of
# computing one thing by torch.equal or ==: it needs a tolerance. (The same computation repeated
# gives the same bits on every CPU, and is compared so.) Arguments go to pytest, such as -k vae.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="[dev,wan]"
source tools/environment.sh
export ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
failed=0
summary=()
for kernels in default avx2; do
  export ATEN_CPU_CAPABILITY="$kernels"
  echo "== tests with ATEN_CPU_CAPABILITY=$kernels ONEDNN_MAX_CPU_ISA=$ONEDNN_MAX_CPU_ISA"
  code=0
  "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile \
    --doctest-modules lightning_kv tests "$@" || code=$?
  if [ "$code" -eq 0 ]; then
    summary+=("$kernels: passed")
  else
    summary+=("$kernels: FAILED (pytest exited with $code)")
    failed=1
  fi
done
echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
