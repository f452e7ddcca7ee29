#!/usr/bin/env bash
# BEiT v2, large, fine-tuned on ImageNet-21k -> semantic segmentation on ADE20K with UPerNet, 160,000 steps.
#   DATA=/path/to/ADEChallengeData2016 OUTPUT=/path/to/save bash scripts/segment/large_v2_ft21k.sh [more flags]
# Hardware: 8 GPUs x 2 images = 16 (kind of GPU not known).
# Time: not known.
# Expected: mIoU 57.5 (beitv2_large_patch16_224_pt1k_ft21ktoade20k in the model zoo).
# Fewer GPUs: `GPUS=2 ... --batch_size 8` keeps GPUs x batch_size x update_freq, and what batch norm sees, at 16.
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_segmentation_finetuning.py \
    --data_path "$DATA" --output_dir "$OUTPUT" --nb_classes 150 --reduce_zero_label --input_size 512 \
    --imagenet_default_mean_and_std --model upernet_beit_large_patch16 --finetune beitv2_large_patch16_224_pt1k_ft21k \
    --layer_scale_init_value 1e-6 --drop_path 0.2 --layer_decay 0.9 \
    --batch_size 2 --update_freq 1 --max_steps 160000 --warmup_steps 1500 --poly_power 1.0 --steps_per_epoch 16000 \
    --opt adamw --opt_betas 0.9 0.999 --weight_decay 0.05 --lr 3e-5 --min_lr 0 \
    "$@"
