#!/usr/bin/env bash
# Does accuracy survive surgery? A ResNet18 is trained on DATA at 64 px, its 3x3 convolutions are replaced, and the
# original and each new network are fine-tuned for five epochs with three seeds. An hour on two cores.
# Usage: runs/surgery.sh DATA
set -euo pipefail
data=$1
out=outputs/surgery
fasternet train resnet18 --data "$data" --recipe small --input-size 64 -o $out/original
fasternet surgery resnet18 --checkpoint $out/original --init random -o $out/random --out $out/log.jsonl
fasternet surgery resnet18 --checkpoint $out/original -o $out/weights --out $out/log.jsonl
fasternet surgery resnet18 --checkpoint $out/original --data "$data/train" -o $out/maps --out $out/log.jsonl
fasternet surgery resnet18 --checkpoint $out/original --data "$data/train" --match macs -o $out/widened --out $out/log.jsonl
for start in original random weights maps widened; do
  for seed in 0 1 2; do
    fasternet train resnet18 --data "$data" --checkpoint $out/$start --recipe finetune --input-size 64 --epochs 5 \
      --seed $seed -o $out/$start-$seed
  done
done
fasternet report $out -o $out/report.html
