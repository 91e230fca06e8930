#!/usr/bin/env bash
# Set up what is missing and run the tests.
#
#   bash scripts/test.sh                              everything, with a sample of the fault injection
#   bash scripts/test.sh --quick                      one process, no fault injection, no rendering: the inner loop
#   bash scripts/test.sh --all                        everything, with the complete fault-injection campaign
#   bash scripts/test.sh tests/algorithm -k cosine    other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

arguments=()
for argument in "$@"; do
    if [[ "$argument" == --quick ]]; then
        arguments+=(-n 2 -m "not distributed and not faults and not world and not slow")
    else
        arguments+=("$argument")
    fi
done
python -m pytest ${arguments[@]+"${arguments[@]}"}
