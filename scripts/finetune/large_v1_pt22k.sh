#!/usr/bin/env bash
# BEiT (v1), large, pretrained on ImageNet-22k -> classification on ImageNet-1k, 50 epochs.
#   DATA=/path/to/imagenet-1k OUTPUT=/path/to/save bash scripts/finetune/large_v1_pt22k.sh [more flags]
# Hardware: 8 GPUs x 64 images x 2 micro-steps = 1024 (kind of GPU not known).
# Time: not known.
# Expected: no figure at hand; 85.2 % top-1 was published for large after pretraining on ImageNet-1k.
# Normalized by 0.5/0.5, as these weights were pretrained: no --imagenet_default_mean_and_std.
# Fewer GPUs: `GPUS=2 ... --update_freq 8` keeps GPUs x batch_size x update_freq at 1024 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_class_finetuning.py \
    --data_set IMNET --nb_classes 1000 \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 \
    --model beit_large_patch16_224 --finetune beit_large_patch16_224_pt22k \
    --layer_scale_init_value 1e-5 --drop_path 0.2 --layer_decay 0.75 \
    --batch_size 64 --update_freq 2 --epochs 50 --warmup_epochs 5 \
    --opt adamw --weight_decay 0.05 --lr 1e-3 --min_lr 1e-6 --save_ckpt_freq 10 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    "$@"
