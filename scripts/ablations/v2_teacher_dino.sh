#!/usr/bin/env bash
# Ablation of BEiT v2, base, tokenizer (VQ-KD): teacher DINO B/16, not CLIP B/16.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_teacher_dino.sh [more flags]
# Expected: no figure at hand (100 % of the codebook in use with a decoder of 1 block: vqkd/base_1x768x12_dino.sh).
# Then: DATA=... OUTPUT=... bash scripts/pretrain/base_300e.sh --tokenizer_weight /path/to/save/checkpoint.pth
recipe=scripts/ablations/v2_teacher_dino.sh exec bash "$(dirname "$0")/../vqkd/base_3x768x12_clip.sh" --teacher_model_type dino "$@"
