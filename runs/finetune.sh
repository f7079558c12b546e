#!/usr/bin/env bash
# Does it pay to begin with weights of another set? Three seeds each, the same epochs:
#     bash runs/finetune.sh SOURCE TARGET [options of fasternet train for TARGET]
# SOURCE is trained once, at 64 px; TARGET then from scratch, from SOURCE's weights with the same recipe, and from them
# with the recipe for it.
set -euo pipefail
source=$1 target=$2
shift 2
place=outputs/finetune-$(basename "$target")
common=(--data "$target" --input-size 128 --epochs 5)

if [ ! -f "$place/source/best/config.json" ]; then
    fasternet train fasternet_t0 --recipe small --data "$source" --output "$place/source" --input-size 64 \
        --epochs "${SOURCE_EPOCHS:-5}"
fi
for seed in 0 1 2; do
    fasternet train fasternet_t0 --recipe small --output "$place/scratch-$seed" --seed "$seed" "${common[@]}" "$@"
    fasternet train fasternet_t0 --recipe small --output "$place/tuned-$seed" --seed "$seed" "${common[@]}" "$@" \
        --checkpoint "$place/source"
    fasternet train fasternet_t0 --recipe finetune --output "$place/finetuned-$seed" --seed "$seed" "${common[@]}" "$@" \
        --checkpoint "$place/source"
done
fasternet results merge "$place"/scratch-* "$place"/tuned-* "$place"/finetuned-* \
    --output "${RECORDS:-results/finetune-$(basename "$target").jsonl}"
