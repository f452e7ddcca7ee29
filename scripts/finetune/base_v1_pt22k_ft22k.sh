#!/usr/bin/env bash
# BEiT (v1), base, pretrained and fine-tuned on ImageNet-22k before -> classification on ImageNet-1k, 30 epochs.
#   DATA=/path/to/imagenet-1k OUTPUT=/path/to/save bash scripts/finetune/base_v1_pt22k_ft22k.sh [more flags]
# Hardware: 8 GPUs x 64 images = 512 (kind of GPU not known).
# Time: not known.
# Expected: 85.2 % top-1 (beit_base_patch16_224_pt22k_ft22kto1k in the model zoo).
# Mixup and cutmix are off: so the recipe has it after ImageNet-22k.
# Normalized by 0.5/0.5, as these weights were pretrained: no --imagenet_default_mean_and_std.
# Fewer GPUs: `GPUS=2 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 512 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_class_finetuning.py \
    --data_set IMNET --nb_classes 1000 \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 \
    --model beit_base_patch16_224 --finetune beit_base_patch16_224_pt22k_ft22k \
    --layer_scale_init_value 0.1 --drop_path 0.1 --layer_decay 0.85 \
    --batch_size 64 --update_freq 1 --epochs 30 --warmup_epochs 5 \
    --opt adamw --weight_decay 1e-8 --lr 2e-5 --min_lr 1e-6 --save_ckpt_freq 5 \
    --mixup 0 --cutmix 0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    "$@"
