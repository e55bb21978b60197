# Sourced by the tools: makes or reuses .venv with mcjax and its needs.
# usage: . tools/_venv.sh EXTRAS   (for instance "test"); sets $python
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extras=${1:-}
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "mcjax needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
  exit 1
}
python=$root/.venv/bin/python
stamp=$root/.venv/.installed-$(echo "$extras" | tr ',' '-')
if [ ! -x "$python" ]; then
  echo "Making .venv ..." >&2
  "$base" -m venv .venv
fi
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  echo "Installing mcjax${extras:+[$extras]} into .venv (a few minutes the first time) ..." >&2
  # --no-compile: most files of transformers are never imported.
  "$python" -m pip install --disable-pip-version-check --progress-bar on \
    --no-compile -e ".${extras:+[$extras]}" 2>&1 | grep --line-buffered -E '^(Collecting|ERROR|Successfully|Installing)|error' >&2 || true
  "$python" -c 'import mcjax' || {
    echo "installation failed: see above" >&2
    exit 1
  }
  touch "$stamp"
fi
