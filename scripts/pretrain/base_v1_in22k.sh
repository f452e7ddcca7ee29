#!/usr/bin/env bash
# BEiT (v1), base: 150 epochs of masked image modeling on ImageNet-22k, without its labels; DALL-E's tokenizer.
#   DATA=/path/to/imagenet-22k OUTPUT=/path/to/save bash scripts/pretrain/base_v1_in22k.sh [more flags]
# Hardware: one DGX-2, 16 V100-32GB x 128 images = 2048.
# Time: about ten days, calculated from the published speed, 2,400 images/s, for 14.2 million images.
# Expected: 83.7 % top-1 on ImageNet-1k after scripts/finetune/base_v1_pt22k.sh.
# Normalized by 0.5/0.5: fine-tune without --imagenet_default_mean_and_std.
# Fewer GPUs: `GPUS=4 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 2048 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-16} NODES=${NODES:-1}
source scripts/launch.sh

launch run_beitv2_pretraining.py \
    --data_set image_folder --data_path "$DATA" --output_dir "$OUTPUT" \
    --model beit_base_patch16_224_8k_vocab --layer_scale_init_value 0.1 --drop_path 0.1 \
    --tokenizer_model dall-e --tokenizer_weight dall_e_encoder --codebook_size 8192 \
    --num_mask_patches 75 --min_mask_patches_per_block 16 --min_crop_scale 0.08 --color_jitter 0.4 \
    --input_size 224 --second_input_size 112 --second_interpolation lanczos \
    --batch_size 128 --epochs 150 --warmup_steps 10000 \
    --opt adamw --opt_betas 0.9 0.999 --opt_eps 1e-8 --weight_decay 0.05 \
    --lr 1.5e-3 --min_lr 1e-5 --clip_grad 3.0 --save_ckpt_freq 20 \
    "$@"
