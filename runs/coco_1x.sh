#!/usr/bin/env bash
# Tables 4 and 7 on one machine with eight GPUs, two pictures each: bash runs/coco_1x.sh COCO [fasternet_s] [OUTPUT]
# COCO holds annotations/, train2017/ and val2017/. The backbone starts from its published ImageNet weights.
# Run it again after an interruption: it goes on. A process that dies is started again, three times at most.
set -euo pipefail
coco=$1 name=${2:-fasternet_s} output=${3:-outputs/$name-coco}

begin=(--pretrained)
if [ -f "$output/recipe.yaml" ]; then begin=(--resume); fi
torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m \
    fasternet detect train "$name" --recipe paper --data "$coco" --output "$output" "${begin[@]}"
fasternet detect eval --data "$coco" --checkpoint "$output"
