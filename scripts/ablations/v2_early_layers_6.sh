#!/usr/bin/env bash
# Ablation of BEiT v2, base, 300 epochs of ImageNet-1k: the CLS head takes its patch tokens after block 6, not 9.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_early_layers_6.sh [more flags]
# Expected: no figure at hand; compare with pretrain/base_300e.sh (85.0 % top-1).
recipe=scripts/ablations/v2_early_layers_6.sh exec bash "$(dirname "$0")/../pretrain/base_300e.sh" --early_layers 6 "$@"
