#!/usr/bin/env bash
# Ablation of BEiT v2, base, 300 epochs of ImageNet-1k: no CLS head, the main branch alone.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_no_cls_head.sh [more flags]
# Expected: no figure at hand; compare with pretrain/base_300e.sh (85.0 % top-1).
recipe=scripts/ablations/v2_no_cls_head.sh exec bash "$(dirname "$0")/../pretrain/base_300e.sh" --model beit_base_patch16_224_8k_vocab "$@"
