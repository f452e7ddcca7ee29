#!/usr/bin/env bash
# The papers' orderings at their size (base, ImageNet-1k): ready to run on GPUs, not run yet.
#   bash scripts/evidence_imagenet.sh --gpu A100-80GB --price 2.5      hours and price of each row, by estimate.py
#   bash scripts/evidence_imagenet.sh --run --data_path /data/imagenet-1k --output_dir /runs [--seeds 0 1 2]
#   bash scripts/evidence_imagenet.sh --tables                         the table of what has been run
# A stopped run goes on with the same line. GPUS, NODES and so on are those of the recipes (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-demo.txt
exec python scripts/run_evidence_imagenet.py "$@"
