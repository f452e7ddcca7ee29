#!/usr/bin/env bash
# VQ-KD: base encoder, decoder of 3 blocks, teacher CLIP B/16; BEiT v2's tokenizer. ImageNet-1k, no labels.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/vqkd/base_3x768x12_clip.sh [more flags]
# Hardware: 8 GPUs x 64 images = 512 (kind of GPU not known).
# Time: not known.
# Expected: 97 % of the codebook in use; total loss about 0.2 (published for VQ-KD as such, not for each tokenizer).
# Fewer GPUs: `GPUS=2 ... --batch_size 256` keeps GPUs x batch_size x update_freq at 512 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_vqkd_training.py \
    --data_set image_folder --data_path "$DATA" --output_dir "$OUTPUT" \
    --model vqkd_encoder_base_decoder_3x768x12_clip \
    --teacher_model_type clip --teacher_input_size 224 --input_size 224 --process_type default \
    --codebook_n_emd 8192 --codebook_emd_dim 32 --quantize_kmeans_init --ema_decay 0.99 --rec_loss_type cosine \
    --min_crop_scale 0.08 --color_jitter 0 --train_interpolation bicubic \
    --batch_size 64 --epochs 100 --warmup_epochs 10 \
    --opt adamw --opt_betas 0.9 0.99 --weight_decay 1e-4 --lr 5e-5 --min_lr 1e-5 --save_ckpt_freq 20 \
    "$@"
