#!/usr/bin/env bash
# Ablation of BEiT (v1), base, 300 epochs of ImageNet-1k: absolute position embeddings instead of the relative bias.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/ablations/v1_positions_absolute.sh [more flags]
# Expected: not published as an ablation; compare with v1_300e.sh.
# Fine-tune with the same positions: --abs_pos_emb --disable_rel_pos_bias --imagenet_default_mean_and_std
recipe=scripts/ablations/v1_positions_absolute.sh exec bash "$(dirname "$0")/../pretrain/base_v1_in1k.sh" --epochs 300 --abs_pos_emb --disable_rel_pos_bias "$@"
