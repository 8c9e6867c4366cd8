#!/usr/bin/env bash
usage='The test suite on several versions of Python, each in a virtual environment of its own.

  bash tools/test_versions.sh                       # 3.10, 3.12 and 3.13, those that are installed
  bash tools/test_versions.sh 3.13                  # one of them
  bash tools/test_versions.sh --dir ~/envs 3.10 3.12 -- tests/cache tests/policies -x

An interpreter is looked for as pythonX.Y on the path and among those of pyenv. 3.10 is tested with
torch 2.11, the oldest that is supported; the others with what pip chooses. An environment takes 6 GB
and some minutes to install.

  --dir DIR       where the environments are made, and found again next time (a temporary folder,
                  removed at the end)
  --torch X.Y     this torch for all versions
  -- WORDS        for pytest: instead of the whole suite, in parallel

One line for each version at the end: Python, torch, results, minutes. Exits with 1 where tests or an
installation failed, or no interpreter was found; versions that are not installed are named.'
set -uo pipefail
cd "$(dirname "$0")/.."
oldest=3.10
oldest_torch=2.11

wrong() {
  echo "error: $1" >&2
  exit 2
}

dir="" torch="" wanted=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      echo "$usage"
      exit 0
      ;;
    --dir) dir="${2:?error: --dir wants a folder, such as --dir ~/envs}" && shift 2 ;;
    --torch) torch="${2:?error: --torch wants a version, such as --torch 2.11}" && shift 2 ;;
    --)
      shift
      break
      ;;
    3.[0-9]*) wanted+=("$1") && shift ;;
    *) wrong "No option or version '$1'. Give versions such as 3.12; words for pytest come after --." ;;
  esac
done
[ ${#wanted[@]} -gt 0 ] || wanted=(3.10 3.12 3.13)
[ $# -gt 0 ] || set -- -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
  --doctest-modules lightning_kv tests
if [ -z "$dir" ]; then
  dir="$(mktemp -d)"
  trap 'rm -rf "$dir"' EXIT
fi
mkdir -p "$dir" || wrong "No folder can be made at --dir $dir. Give one that can be written to."
dir="$(cd "$dir" && pwd)"

find_python() { # a shim of pyenv may be on the path and not start
  local found
  for found in "$(command -v "python$1")" \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [ -x "$found" ] && "$found" -c 'import venv' 2>/dev/null; then
      echo "$found"
      return
    fi
  done
}

failed=0 lines=() missing=()
for version in "${wanted[@]}"; do
  python="$(find_python "$version")"
  if [ -z "$python" ]; then
    missing+=("$version")
    continue
  fi
  own="$torch"
  [ -n "$own" ] || [ "$version" != $oldest ] || own=$oldest_torch
  env="$dir/$version"
  echo "== Python $version: $env"
  began=$SECONDS
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  if ! "$env/bin/python" -m pip install --quiet --disable-pip-version-check \
    -e ".[dev,wan]" ${own:+"torch==$own.*"}; then
    lines+=("Python $version: not installed, see above") failed=1
    continue
  fi
  log="$env/tests.log"
  OMP_NUM_THREADS=1 "$env/bin/python" -m pytest "$@" 2>&1 | tee "$log"
  [ "${PIPESTATUS[0]}" = 0 ] || failed=1
  with="$("$env/bin/python" -c 'import platform, torch; print(platform.python_version() + ", torch " + torch.__version__)')"
  result="$(grep -E '(passed|failed|error).* in [0-9.]+s' "$log" | tail -1 | tr -d =)"
  lines+=("Python $with: ${result:-no result}; $(((SECONDS - began + 30) / 60)) min with the installation")
done
echo "== results"
[ ${#lines[@]} -eq 0 ] || printf '%s\n' "${lines[@]}"
[ ${#missing[@]} -eq 0 ] || echo "not installed here: Python ${missing[*]}"
[ ${#lines[@]} -gt 0 ] || wrong "None of Python ${wanted[*]} was found. Install one, with pyenv for example."
exit $failed
