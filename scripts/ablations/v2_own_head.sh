#!/usr/bin/env bash
# Ablation of BEiT v2, base, 300 epochs of ImageNet-1k: the CLS head predicts with a norm and a head of its own.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_own_head.sh [more flags]
# Expected: no figure at hand; compare with pretrain/base_300e.sh (85.0 % top-1).
recipe=scripts/ablations/v2_own_head.sh exec bash "$(dirname "$0")/../pretrain/base_300e.sh" --shared_lm_head False "$@"
