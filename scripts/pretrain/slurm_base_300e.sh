#!/usr/bin/env bash
# BEiT v2 base, 300 epochs, as a SLURM job on one machine with 16 GPUs (the published DGX-2: 16 V100-32GB, about 25 hours);
# expected: 85.0 top-1 after fine-tuning. A preempted or timed-out job saves within two minutes and goes on when requeued.
#   DATA=/data/imagenet-1k/train OUTPUT=/shared/runs/base sbatch scripts/pretrain/slurm_base_300e.sh [flags]
# Other machines: --nodes, --ntasks-per-node and --gpus-per-node on sbatch's line, and NODES and GPUS to match; the
# effective batch (NODES x GPUS x batch_size x update_freq) should stay 2048. OUTPUT must be a folder that all nodes see.
#SBATCH --job-name=beitv2-base
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=16
#SBATCH --gpus-per-node=16
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
# srun starts one process a GPU; the recipe sees that and launches nothing on top. SIGUSR1 reaches them two minutes before
# the end: they finish the step, save and exit 0, and a run that is not finished then asks for the next slot.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) NODES="${SLURM_NNODES:-1}" GPUS="${SLURM_NTASKS_PER_NODE:-16}"
srun bash scripts/pretrain/base_300e.sh "$@"
[ -e "$OUTPUT/checkpoint-299.pth" ] || scontrol requeue "$SLURM_JOB_ID"
