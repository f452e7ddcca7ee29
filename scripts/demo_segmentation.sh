#!/usr/bin/env bash
# Semantic segmentation end to end on real images: tokenizer, pretraining, fine-tuning from both, overlays and a table.
#   bash scripts/demo_segmentation.sh
# Ten frames of one microscope's field over time: a demo, not a benchmark. docs/lab/demo.md says how long it took
# and what came out. Results: demo_output_segmentation/; that of an earlier run is kept with a number behind its name.
set -euo pipefail
if [ $# -gt 0 ]; then echo "error: it takes no argument; docs/segmentation.md says how to use your own masks" >&2; exit 2; fi
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-demo.txt
exec python scripts/demo_segmentation.py
