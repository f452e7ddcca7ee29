#!/usr/bin/env bash
# BEiT v2, base, 1600 epochs of pretraining -> 90 epochs of ImageNet-21k (a folder for each of 21841 classes).
#   DATA=/path/to/imagenet-21k OUTPUT=/path/to/save bash scripts/finetune/base_v2_to_21k.sh [more flags]
# Hardware: 32 GPUs x 128 images = 4096, here taken as 4 machines of 8 (neither that nor the kind of GPU is known).
# Time: not known.
# Expected: no figure of its own; scripts/finetune/base_v2_ft21k.sh brings what comes out to 86.5 % top-1 on ImageNet-1k.
# Fewer GPUs: `NODES=1 GPUS=8 ... --update_freq 4` keeps GPUs x batch_size x update_freq at 4096 (docs/clusters.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-8} NODES=${NODES:-4}
source scripts/launch.sh

launch run_class_finetuning.py \
    --data_set image_folder --nb_classes 21841 --disable_eval_during_finetuning \
    --data_path "$DATA" --output_dir "$OUTPUT" --input_size 224 --imagenet_default_mean_and_std \
    --model beit_base_patch16_224 --finetune beitv2_base_patch16_224_pt1k \
    --layer_scale_init_value 0.1 --drop_path 0.1 --layer_decay 0.75 \
    --batch_size 128 --update_freq 1 --epochs 90 --warmup_epochs 20 \
    --opt adamw --weight_decay 0.05 --lr 6e-4 --min_lr 1e-6 --save_ckpt_freq 10 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 \
    "$@"
