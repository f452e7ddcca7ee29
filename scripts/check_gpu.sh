#!/usr/bin/env bash
# For whoever has a GPU: does everything work on it, and how fast? At most 10 minutes; writes gpu_report.json.
#   bash scripts/check_gpu.sh                         --peak_tflops 989 adds MFU for a card that it does not know
#   bash scripts/check_gpu.sh --device cpu --tiny     tries the check itself, without a GPU
# It takes the Python that is active, or .venv, or python3, with the torch it has. Only where that lacks something
# are the requirements installed, as scripts/demo.sh does.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
else
    python=$(command -v python || command -v python3 || true)
fi
if [ -z "$python" ] || ! "$python" "$root/scripts/check_gpu.py" --help >/dev/null 2>&1; then
    if ! command -v nvidia-smi >/dev/null && [[ " $* " != *" cpu "* ]]; then
        echo "error: there is no GPU here, so nothing was checked (--device cpu --tiny tries the check itself)" >&2
        exit 2
    fi
    here=$PWD
    cd "$root"
    source scripts/environment.sh requirements.txt requirements-dev.txt
    cd "$here"
    python=python
fi
exec "$python" "$root/scripts/check_gpu.py" "$@"
