#!/usr/bin/env bash
# Fine-tune with CRaFT on all GPUs of this machine. Edit the values below, or pass flags: they come last and win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

DATASET="lerobot/aloha_sim_insertion_human"   # the new task
POLICY="lerobot/pi0_fast"                     # the teacher: what is fine-tuned, and what must not be lost
ANCHORS="data/anchor_cache"                   # built by craft-ds anchors from the old tasks
OUTPUT="outputs/craft_train"

# MASTER_PORT=29501 bash scripts/train_craft.sh runs beside another job of this machine.
exec deepspeed ${MASTER_PORT:+--master_port="$MASTER_PORT"} scripts/train_craft.py \
    --ds_config ds_configs/zero3.json \
    --engine.dtype=bfloat16 \
    --policy.path="$POLICY" \
    --dataset.repo_id="$DATASET" \
    --output_dir="$OUTPUT" \
    --steps=10000 --batch_size=8 --eval_freq=1000 --log_freq=100 --save_freq=1000 \
    --craft.enabled=true --craft.anchor_cache_dir="$ANCHORS" \
    "$@"
