#!/bin/bash
# Adapt-Accel on four nodes of eight GPUs: sbatch recipes/launch/slurm.sh recipes/llama-3.1-8b.yaml runs/llama-80
# The output directory has to be on a file system that all nodes share. --resume makes a job that was requeued go on.
#SBATCH --job-name=adapt-pruner
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
recipe=$1
output=$2
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-endpoint "$head_node:29500" \
  --rdzv-id "$SLURM_JOB_ID" \
  -m adapt_pruner accel "$recipe" --output "$output" --resume
