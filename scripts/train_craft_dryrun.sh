#!/usr/bin/env bash
# Three steps of everything, on the embedded world of blocks: data set, policy, anchors, both passes, optimizer,
# export.
#
#   bash scripts/train_craft_dryrun.sh                                                one process
#   LAUNCH="torchrun --nproc-per-node 2" bash scripts/train_craft_dryrun.sh --engine=fsdp
#   LAUNCH="deepspeed --num_gpus 2" bash scripts/train_craft_dryrun.sh --ds_config ds_configs/zero3.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
teacher=craft_ds/worlds/assets/blocks_teacher

python scripts/make_world.py --world blocks --output_dir "$scratch/world" --episodes_per_task 4 \
    --processes 1
python scripts/build_anchor_cache.py --dataset_repo_id=craft-ds/blocks-old --dataset_root="$scratch/world/old" \
    --policy_path="$teacher" --output_dir="$scratch/anchors" --num_samples=32 --num_workers=0
${LAUNCH:-python} scripts/train_craft.py \
    --policy.path="$teacher" --dataset.repo_id=craft-ds/blocks-new --dataset.root="$scratch/world/new" \
    --output_dir="$scratch/run" --steps=3 --batch_size=4 --log_freq=1 --save_freq=0 --num_workers=0 \
    --craft.enabled=true --craft.anchor_cache_dir="$scratch/anchors" --craft.anchor_batch_size=4 \
    --craft.retention_freq=2 "$@"
python scripts/export_checkpoint.py "$scratch/run/final" --output "$scratch/exported"
echo "dry run passed"
