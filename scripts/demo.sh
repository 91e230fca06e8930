#!/usr/bin/env bash
# The main job, from nothing: set up what is missing, then fine-tune the embedded pi0_fast on a new task with
# and without CRaFT, on 2 ranks, and measure what became of the old tasks.
#
#   bash scripts/demo.sh                     one seed, on ZeRO-3
#   bash scripts/demo.sh --engine fsdp       on FSDP2
#   bash scripts/demo.sh --lora              LoRA adapters beside full fine-tuning
#   bash scripts/demo.sh --seeds 0 1 2       three seeds; see --help for the rest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

exec python scripts/demo.py "$@"
