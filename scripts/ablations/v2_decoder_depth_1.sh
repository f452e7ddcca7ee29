#!/usr/bin/env bash
# Ablation of BEiT v2, base, tokenizer (VQ-KD): a decoder of 1 block, not 3.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_decoder_depth_1.sh [more flags]
# Expected: 100 % of the codebook in use (97 % with 3 blocks).
# Then: DATA=... OUTPUT=... bash scripts/pretrain/base_300e.sh --tokenizer_weight /path/to/save/checkpoint.pth
recipe=scripts/ablations/v2_decoder_depth_1.sh exec bash "$(dirname "$0")/../vqkd/base_3x768x12_clip.sh" --decoder_depth 1 "$@"
