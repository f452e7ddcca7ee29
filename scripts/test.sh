#!/usr/bin/env bash
# Lint, types, tests: what must pass before every commit. Arguments go to pytest: bash scripts/test.sh -k quantizer
# --fast, as the first argument, leaves out the tests marked slow: three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-demo.txt requirements-dev.txt

quick=()
if [[ ${1:-} == --fast ]]; then quick=(-m "not slow"); shift; fi
processes=${TEST_PROCESSES:-$(nproc 2>/dev/null || echo 2)} # before the next line: nproc obeys OMP_NUM_THREADS
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
echo "lint";  ruff check .
echo "format"; ruff format --check .
echo "types"; mypy
echo "tests"; exec python -m pytest -n "$processes" ${quick[@]+"${quick[@]}"} "$@"
