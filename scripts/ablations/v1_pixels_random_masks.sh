#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: pixels, and single patches masked.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_pixels_random_masks.sh [more flags]
# Expected: 80.50 % top-1, 37.09 mIoU (BEiT as it is: 82.86, 44.65).
recipe=scripts/ablations/v1_pixels_random_masks.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --target pixels --mask_type random "$@"
