#!/usr/bin/env bash
# The claims, rerun: a grid of small real trainings, one JSON file a run in docs/evidence/, and docs/evidence.md of them.
#   bash scripts/evidence.sh            what is missing of the grid (hours; it can be killed and goes on)
#   bash scripts/evidence.sh --plan     how many runs and hours
#   bash scripts/evidence.sh --quick    a part of it again, in under 15 minutes on two cores: the same figures?
# More: bash scripts/evidence.sh --help. Photos: PyPI's elpv-dataset, Debian's mate-backgrounds (apt-get download).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-demo.txt
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 # a run is one thread: its figures do not depend on the machine's cores
exec python scripts/run_evidence.py "$@"
