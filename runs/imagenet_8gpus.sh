#!/usr/bin/env bash
# Table 6 on one machine with eight GPUs: bash runs/imagenet_8gpus.sh IMAGENET [fasternet_t0] [OUTPUT]
# IMAGENET holds train/ and val/ with a folder per class, or packed shards (fasternet data pack).
# Run it again after an interruption: it goes on. A process that dies is started again, three times at most.
set -euo pipefail
imagenet=$1 name=${2:-fasternet_t0} output=${3:-outputs/$name-imagenet}

resume=()
if [ -f "$output/recipe.yaml" ]; then resume=(--resume); fi
torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m \
    fasternet train "$name" --recipe paper --data "$imagenet" --output "$output" "${resume[@]}"
fasternet eval --data "$imagenet" --checkpoint "$output"
