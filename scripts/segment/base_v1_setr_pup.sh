#!/usr/bin/env bash
# BEiT v1, base, ImageNet-22k pretraining -> semantic segmentation on ADE20K with SETR-PUP, its paper's head.
#   DATA=/path/to/ADEChallengeData2016 OUTPUT=/path/to/save bash scripts/segment/base_v1_setr_pup.sh [more flags]
# Hardware: 8 GPUs x 2 images = 16 (kind of GPU not known).
# Time: not known.
# Expected: none at hand from these weights. The paper's, pretrained on ImageNet-1k: mIoU 44.65 after 300 epochs, 45.58 after
# 800 (add --imagenet_default_mean_and_std --finetune CHECKPOINT for such a run of scripts/pretrain/base_v1_in1k.sh). Its
# schedule is not known here: steps, rates and augmentation are those of the UPerNet recipes.
# Fewer GPUs: `GPUS=2 ... --batch_size 8` keeps GPUs x batch_size x update_freq, and what batch norm sees, at 16.
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_segmentation_finetuning.py \
    --data_path "$DATA" --output_dir "$OUTPUT" --nb_classes 150 --reduce_zero_label --input_size 512 \
    --model setr_pup_beit_base_patch16 --finetune beit_base_patch16_224_pt22k \
    --layer_scale_init_value 0.1 --drop_path 0.15 --layer_decay 0.75 \
    --batch_size 2 --update_freq 1 --max_steps 160000 --warmup_steps 1500 --poly_power 1.0 --steps_per_epoch 16000 \
    --opt adamw --opt_betas 0.9 0.999 --weight_decay 0.05 --lr 5e-5 --min_lr 0 \
    "$@"
