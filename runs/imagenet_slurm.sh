#!/usr/bin/env bash
# Table 6 under SLURM on four nodes with eight GPUs each: sbatch runs/imagenet_slurm.sh IMAGENET fasternet_l OUTPUT
# Before its time is up the job gets SIGTERM, saves the state and goes back into the queue, from where it goes on.
#SBATCH --job-name=fasternet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
imagenet=$1 name=$2 output=$3

main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else processes that are started again may meet addresses of dead ones
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds from SIGTERM to SIGKILL; SLURM itself gives 120
resume=()
if [ -f "$output/recipe.yaml" ]; then resume=(--resume); fi
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"; wait; scontrol requeue "$SLURM_JOB_ID"' USR1
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$main:29500" --rdzv-id "$SLURM_JOB_ID" -m \
    fasternet train "$name" --recipe paper --data "$imagenet" --output "$output" "${resume[@]}" &
wait
