#!/usr/bin/env bash
# Set up what is missing and run the tests. Arguments go to pytest: bash scripts/test.sh tests/test_dual.py -k cosine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

python -m pytest "$@"
