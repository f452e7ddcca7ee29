#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: nothing is masked, all tokens are predicted.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_no_mask.sh [more flags]
# Expected: 81.67 % top-1, 36.73 mIoU (BEiT as it is: 82.86, 44.65).
recipe=scripts/ablations/v1_no_mask.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --no_mask --num_mask_patches 0 "$@"
