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

# Tests of several ranks, of faults and of rendering need both cores for themselves; the others share them.
readonly ALONE="distributed or world or (faults and not one_process)"
arguments=()
only=""
for argument in "$@"; do
    case "$argument" in
        --quick) arguments+=(-n 2 -m "not ($ALONE or faults or slow)") && only=quick ;;
        --all) arguments+=("$argument") ;;
        *) arguments+=("$argument") && only=given ;;
    esac
done
if [[ -n "$only" ]]; then
    exec python -m pytest ${arguments[@]+"${arguments[@]}"}
fi
status=0
python -m pytest ${arguments[@]+"${arguments[@]}"} -n 2 -m "not ($ALONE)" || status=$?
python -m pytest ${arguments[@]+"${arguments[@]}"} -m "$ALONE" || status=$?
exit "$status"
