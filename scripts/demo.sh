#!/usr/bin/env bash
# Install what is missing, then fine-tune the embedded pi0_fast on a new task with and without CRaFT, on 2
# ranks, and measure old and new tasks.
#
#   bash scripts/demo.sh                     one seed, on ZeRO-3
#   bash scripts/demo.sh --engine fsdp       on FSDP2
#   bash scripts/demo.sh --lora              LoRA adapters in addition to full fine-tuning
#   bash scripts/demo.sh --seeds 0 1 2       three seeds; see --help for the rest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

exec python -m craft_ds demo "$@"
