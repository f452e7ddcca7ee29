#!/usr/bin/env bash
# Ablation of BEiT v2, base, tokenizer (VQ-KD): codes of dimension 64, not 32.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v2_codebook_dim_64.sh [more flags]
# Expected: no figure at hand; compare with vqkd/base_3x768x12_clip.sh (97 % of the codebook in use).
# Then: DATA=... OUTPUT=... bash scripts/pretrain/base_300e.sh --tokenizer_weight /path/to/save/checkpoint.pth --codebook_dim 64
recipe=scripts/ablations/v2_codebook_dim_64.sh exec bash "$(dirname "$0")/../vqkd/base_3x768x12_clip.sh" --codebook_emd_dim 64 "$@"
