# Sourced by the other scripts: a virtual environment in .venv with this package in it.
# extras="[dev]" before sourcing adds extras. LIGHTNING_KV_VENV names another place, PYTHON another interpreter (3.10 to 3.13).
venv="${LIGHTNING_KV_VENV:-.venv}"
marker="$venv/.lightning_kv$extras"
if [ ! -x "$venv/bin/python" ]; then
  echo "== virtual environment in $venv"
  "${PYTHON:-python3}" -m venv "$venv" || {
    echo "error: python3 -m venv failed. Install Python 3.10 to 3.13 with its venv module, or set PYTHON." >&2
    exit 1
  }
fi
if [ ! -f "$marker" ] || [ pyproject.toml -nt "$marker" ]; then
  echo "== installing (torch is large: this takes a few minutes)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$extras"
  touch "$marker"
fi
