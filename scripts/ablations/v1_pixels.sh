#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: masked patches predict their pixels, not their tokens.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_pixels.sh [more flags]
# Expected: 81.04 % top-1, 41.38 mIoU (BEiT as it is: 82.86, 44.65).
recipe=scripts/ablations/v1_pixels.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --target pixels "$@"
