#!/usr/bin/env bash
# BEiT v2, base: 1600 epochs of masked image modeling on ImageNet-1k, without its labels.
#   DATA=/path/to/imagenet-1k/train OUTPUT=/path/to/save bash scripts/pretrain/base_1600e.sh [more flags]
# Hardware: one DGX-2, 16 V100-32GB x 128 images = 2048.
# Time: about 5.5 days, calculated from the published speed, 4,300 images/s.
# Expected: 85.5 % top-1 on ImageNet-1k after scripts/finetune/base_v2_1600e.sh.
# Fewer GPUs: `GPUS=4 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 2048 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-16} NODES=${NODES:-1}
source scripts/launch.sh

launch run_beitv2_pretraining.py \
    --data_set image_folder --data_path "$DATA" --output_dir "$OUTPUT" \
    --model beit_base_patch16_224_8k_vocab_cls_pt \
    --early_layers 9 --head_layers 2 --shared_lm_head True --layer_scale_init_value 0.1 --drop_path 0.1 \
    --tokenizer_model vqkd_encoder_base_decoder_3x768x12_clip \
    --tokenizer_weight vqkd_encoder_base_decoder_3x768x12_clip \
    --num_mask_patches 75 --min_mask_patches_per_block 16 --min_crop_scale 0.2 --color_jitter 0.4 \
    --input_size 224 --second_input_size 224 --second_interpolation bicubic --imagenet_default_mean_and_std \
    --batch_size 128 --epochs 1600 --warmup_epochs 10 \
    --opt adamw --opt_betas 0.9 0.999 --opt_eps 1e-8 --weight_decay 0.05 \
    --lr 1.5e-3 --min_lr 1e-5 --clip_grad 3.0 --save_ckpt_freq 20 \
    "$@"
