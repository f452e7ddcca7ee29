#!/usr/bin/env bash
# BEiT v2 end to end on real photos: tokenizer, pretraining, fine-tuning, pictures and a table.
#   bash scripts/demo.sh               solar cells from the PyPI package elpv-dataset
#   bash scripts/demo.sh my_images/    your own folder; with one folder per class it is also fine-tuned
# It uses the CPU alone; two cores are enough. README.md says how long it took and what came out.
# Results: demo_output/; that of an earlier run is kept as demo_output-1, demo_output-2, ...
set -euo pipefail
if [ $# -gt 0 ]; then
    if [ ! -d "$1" ]; then echo "error: $1: no such folder; give a folder of images, or nothing" >&2; exit 2; fi
    set -- "$(cd "$1" && pwd)"
fi
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-demo.txt
exec python scripts/demo.py "$@"
