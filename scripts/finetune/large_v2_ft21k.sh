#!/usr/bin/env bash
# BEiT v2, large, fine-tuned on ImageNet-21k before -> classification on ImageNet-1k, 20 epochs.
#   DATA=/path/to/imagenet-1k OUTPUT=/path/to/save bash scripts/finetune/large_v2_ft21k.sh [more flags]
# Hardware: 8 GPUs x 64 images x 2 micro-steps = 1024 (kind of GPU not known).
# Time: not known.
# Expected: 88.4 % top-1 (beitv2_large_patch16_224_pt1k_ft21kto1k in the model zoo: 88.370, top-5 98.578).
# Mixup and cutmix are off: so the recipe has it after ImageNet-21k.
# Fewer GPUs: `GPUS=2 ... --update_freq 8` keeps GPUs x batch_size x update_freq at 1024 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_class_finetuning.py \
    --data_set IMNET --nb_classes 1000 \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 --imagenet_default_mean_and_std \
    --model beit_large_patch16_224 --finetune beitv2_large_patch16_224_pt1k_ft21k \
    --layer_scale_init_value 1e-5 --drop_path 0.25 --layer_decay 0.8 \
    --batch_size 64 --update_freq 2 --epochs 20 --warmup_epochs 5 \
    --opt adamw --weight_decay 0.05 --lr 7e-5 --min_lr 1e-6 --save_ckpt_freq 5 \
    --mixup 0 --cutmix 0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    "$@"
