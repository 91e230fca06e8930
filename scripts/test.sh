#!/usr/bin/env bash
# Set up what is missing and run the tests. Arguments go to pytest: bash scripts/test.sh tests/algorithm/test_multiplier.py -k cosine
# --all runs the whole campaign of tests/faults where else a sample runs, and prints its table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

python -m pytest "$@"
