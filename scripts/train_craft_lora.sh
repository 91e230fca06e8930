#!/usr/bin/env bash
# Fine-tune LoRA adapters with CRaFT: the preset for one or two GPUs of 24 GB. Edit the values below, or pass
# flags: they come last and win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

DATASET="lerobot/aloha_sim_insertion_human"   # the new task
POLICY="lerobot/pi0_fast"                     # the teacher: frozen here, adapters train beside it
ANCHORS="data/anchor_cache"                   # built by craft-ds anchors from the old tasks
OUTPUT="outputs/craft_lora"

# `--ds_config zero3_lora` is the same preset for DeepSpeed.
exec torchrun --standalone --nproc-per-node "${NPROC:-auto}" scripts/train_craft.py \
    --config_path=fsdp_configs/lora.yaml \
    --policy.path="$POLICY" \
    --dataset.repo_id="$DATASET" \
    --output_dir="$OUTPUT" \
    --steps=10000 --batch_size=4 --gradient_accumulation_steps=2 \
    --eval_freq=1000 --log_freq=100 --save_freq=1000 \
    --craft.enabled=true --craft.anchor_cache_dir="$ANCHORS" \
    "$@"
