#!/usr/bin/env bash
# Measures on this machine's GPU what docs/gpu.md shows: run.py says how, and operators.py what `run.sh operators` does. Nothing is
# fetched: packages that are missing come as wheels in the folder that WHEELS names (wheels.sh makes one), and go into a folder
# of their own.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
path="$root/src:$root/benchmarks"
if [ -n "${WHEELS:-}" ]; then
  site="$(mktemp -d)"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
  path="$path:$site"
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
script=run.py
[ "${1:-}" = operators ] && script=operators.py && shift
exec "$python" "$here/$script" "$@"
