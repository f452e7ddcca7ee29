#!/usr/bin/env bash
# BEiT v2, base, fine-tuned on ImageNet-21k before -> classification on ImageNet-1k, 30 epochs.
#   DATA=/path/to/imagenet-1k OUTPUT=/path/to/save bash scripts/finetune/base_v2_ft21k.sh [more flags]
# Hardware: 8 GPUs x 128 images = 1024 (kind of GPU not known).
# Time: not known.
# Expected: 86.5 % top-1 (beitv2_base_patch16_224_pt1k_ft21kto1k in the model zoo: 86.458, top-5 97.978).
# Mixup and cutmix are off: so the recipe has it after ImageNet-21k.
# Fewer GPUs: `GPUS=2 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 1024 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_class_finetuning.py \
    --data_set IMNET --nb_classes 1000 \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 --imagenet_default_mean_and_std \
    --model beit_base_patch16_224 --finetune beitv2_base_patch16_224_pt1k_ft21k \
    --layer_scale_init_value 0.1 --drop_path 0.1 --layer_decay 0.75 \
    --batch_size 128 --update_freq 1 --epochs 30 --warmup_epochs 20 \
    --opt adamw --weight_decay 0.05 --lr 5e-5 --min_lr 1e-6 --save_ckpt_freq 5 \
    --mixup 0 --cutmix 0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    "$@"
