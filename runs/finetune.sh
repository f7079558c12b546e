#!/usr/bin/env bash
# Does it pay to begin with weights of another set? Three seeds each, the same epochs:
#     bash runs/finetune.sh SOURCE TARGET [options of fasternet train for TARGET]
# SOURCE is trained once; TARGET then from its weights and from scratch.
set -euo pipefail
source=$1 target=$2
shift 2
place=outputs/finetune-$(basename "$target")

if [ ! -f "$place/source/best/config.json" ]; then
    fasternet train fasternet_t0 --recipe small --data "$source" --output "$place/source" --input-size 64 \
        --epochs "${SOURCE_EPOCHS:-5}"
fi
for seed in 0 1 2; do
    fasternet train fasternet_t0 --recipe small --data "$target" --output "$place/scratch-$seed" --seed "$seed" "$@"
    fasternet train fasternet_t0 --recipe finetune --data "$target" --output "$place/finetuned-$seed" --seed "$seed" \
        --checkpoint "$place/source" --input-size 128 "$@"
done
fasternet results merge "$place"/scratch-* "$place"/finetuned-* --output "${RECORDS:-results/finetune-$(basename "$target").jsonl}"
