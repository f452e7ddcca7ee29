#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: single patches are masked, not blocks.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_random_masks.sh [more flags]
# Expected: 82.77 % top-1, 42.93 mIoU (BEiT as it is: 82.86, 44.65).
recipe=scripts/ablations/v1_random_masks.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --mask_type random "$@"
