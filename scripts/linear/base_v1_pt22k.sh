#!/usr/bin/env bash
# BEiT v1, base, ImageNet-22k pretraining -> its linear probe on ImageNet-1k, every layer, CLS and mean, 100 epochs.
#   DATA=/path/to/imagenet-1k OUTPUT=/path/to/save bash scripts/linear/base_v1_pt22k.sh [more flags]
# Hardware: 8 GPUs x 128 images = 1024 (kind of GPU not known).
# Time: not known.
# Expected: not published for these weights; 56.7 % (layer 9) after pretraining on ImageNet-1k (BEiT's paper).
# Fewer GPUs: `GPUS=2 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 1024 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-1}
source scripts/launch.sh

launch run_linear_eval.py --linear --protocol published \
    --data_set IMNET --nb_classes 1000 \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 \
    --finetune beit_base_patch16_224_pt22k --features cls_mean \
    --batch_size 128 --update_freq 1 --epochs 100 --warmup_epochs 0 \
    --opt adamw --lr 4e-3 --min_lr 0 --weight_decay 1e-4 \
    --min_crop_scale 0.08 --color_jitter 0 --train_interpolation bilinear --save_ckpt_freq 20 \
    "$@"
