#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: the run that the others differ from in one thing.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_300e.sh [more flags]
# Expected: 82.86 % top-1 on ImageNet-1k, 44.65 mIoU on ADE20K after fine-tuning; masked accuracy 4.96 %, loss 6.30.
recipe=scripts/ablations/v1_300e.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 "$@"
