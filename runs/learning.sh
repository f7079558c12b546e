#!/usr/bin/env bash
# The same recipe for four networks, three seeds each: bash runs/learning.sh DATA [options of fasternet train]
#     bash runs/learning.sh flowers                                             (128 px, CPU or GPU)
#     bash runs/learning.sh cifar10 --input-size 64                            (a GPU)
#     NETWORKS="fasternet_t0 MobileNetV2" bash runs/learning.sh flowers         (what a CPU does in an hour)
# A run that was interrupted goes on; the records of all runs end in results/learning-DATA.jsonl.
set -euo pipefail
data=$1
shift
place=outputs/learning-$(basename "$data")

for seed in 0 1 2; do
    for name in ${NETWORKS:-fasternet_t0 fasternet_t1 MobileNetV2 shufflenet_v2_x1_5}; do
        run=$place/$name-$seed
        if grep -qs '"kind": "evaluation"' "$run/log.jsonl"; then continue; fi
        if [ -f "$run/recipe.yaml" ]; then
            fasternet train "$name" --data "$data" --output "$run" --resume
        else
            fasternet train "$name" --recipe small --data "$data" --output "$run" --seed "$seed" "$@"
        fi
    done
done
fasternet results merge "$place"/* --output "${RECORDS:-results/learning-$(basename "$data").jsonl}"
