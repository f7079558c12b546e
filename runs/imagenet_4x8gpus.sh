#!/usr/bin/env bash
# Table 6 on four machines with eight GPUs each. On every one of them:
#     MAIN=host-of-the-first:29500 bash runs/imagenet_4x8gpus.sh IMAGENET fasternet_l OUTPUT
# OUTPUT lies on storage that all machines see. A batch of 2048 or 4096 pictures is shared by 32 processes.
set -euo pipefail
imagenet=$1 name=$2 output=$3

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else processes that are started again may meet addresses of dead ones
resume=()
if [ -f "$output/recipe.yaml" ]; then resume=(--resume); fi
torchrun --nnodes 4 --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$MAIN" --rdzv-id "$name" -m \
    fasternet train "$name" --recipe paper --data "$imagenet" --output "$output" "${resume[@]}"
