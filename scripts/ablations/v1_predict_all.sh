#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: all tokens are predicted, not the masked ones alone.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_predict_all.sh [more flags]
# Expected: 82.59 % top-1, 40.93 mIoU (BEiT as it is: 82.86, 44.65).
recipe=scripts/ablations/v1_predict_all.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --predict all "$@"
