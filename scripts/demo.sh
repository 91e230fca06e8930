#!/usr/bin/env bash
# Install what is missing, then fine-tune the embedded pi0_fast on a new task by plain fine-tuning, by replay
# and by CRaFT, and measure old and new tasks.
#
#   bash scripts/demo.sh                     three seeds, each run in one process
#   bash scripts/demo.sh --engine zero3      each run on 2 ranks of ZeRO-3; --engine fsdp: of FSDP2
#   bash scripts/demo.sh --lora              LoRA adapters in addition to full fine-tuning
#   bash scripts/demo.sh --seeds 21          one seed; see --help for the rest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

exec python -m craft_ds demo "$@"
