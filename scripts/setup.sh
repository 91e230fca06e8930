#!/usr/bin/env bash
# Create or reuse .venv in this repository, with everything that training, the demo and the tests need.
#
#   bash scripts/setup.sh        prepare .venv
#   source scripts/setup.sh      the same, then put .venv first on PATH (as demo.sh, test.sh and .ci/run do)
#
# PYTHON=/path/to/python3.12 selects the interpreter. A second call returns at once: a stamp in .venv records
# what was installed.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: the work runs in a separate process, so that its strict mode does not leak into the caller.
    bash "${BASH_SOURCE[0]}" || return 1
    VIRTUAL_ENV="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
    export VIRTUAL_ENV
    export PATH="$VIRTUAL_ENV/bin:$PATH"                # DeepSpeed needs ninja on PATH
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # the ranks of one machine share its cores
    return 0
fi

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly ROOT="$PWD"
readonly VENV="$ROOT/.venv"
readonly STAMP="$VENV/craft-ds.stamp"
readonly EXTRAS="deepspeed,world,dev"

say() { echo "setup: $*"; }
die() { echo "error: $*" >&2; exit 1; }

# A name on PATH is not enough (pyenv has shims for inactive versions): run the interpreter.
works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' \
        >/dev/null 2>&1 </dev/null
}

find_python() {
    local candidate pyenv_root
    if [[ -n "${PYTHON:-}" ]]; then
        works "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.12 or 3.13 with venv; unset it or point it at one"
        command -v "$PYTHON"
        return
    fi
    pyenv_root="${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}"
    for candidate in python3.12 python3.13 python3 \
        "$pyenv_root"/versions/3.12*/bin/python "$pyenv_root"/versions/3.13*/bin/python; do
        if works "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# Print a hash of everything that an installed .venv depends on; empty if .venv has no working Python.
fingerprint() {
    "$VENV/bin/python" - "$ROOT" "$EXTRAS" 2>/dev/null <<'PY' || true
import hashlib, pathlib, sys
root, extras = sys.argv[1:]
project = pathlib.Path(root, "pyproject.toml").read_bytes()
print(hashlib.sha256(b"\0".join([project, sys.version.encode(), root.encode(), extras.encode()])).hexdigest())
PY
}

make_venv() {
    local python
    python="$(find_python)"
    if [[ -n "$python" ]]; then
        say "creating .venv with $python ($("$python" -V))"
        "$python" -m venv --clear "$VENV"
    elif command -v uv >/dev/null; then
        say "no Python 3.12 or 3.13 found; uv installs one"
        uv venv --quiet --clear --seed --python 3.12 "$VENV"
    else
        die "no Python 3.12 or 3.13 with venv found: install one (Debian: apt install python3.12-venv; else" \
            "'pyenv install 3.12' or 'pip install uv'), or set PYTHON=/path/to/python3.12"
    fi
}

# pip writes INSTALLER after a package's files: if it is missing, the installation was interrupted, and pip
# would consider the package complete.
remove_interrupted_installations() {
    local info
    for info in "$VENV"/lib/python3.*/site-packages/*.dist-info; do
        if [[ -d "$info" && ! -e "$info/INSTALLER" ]]; then
            say "repairing $(basename "$info" .dist-info), whose installation was interrupted"
            rm -rf "$info"
        fi
    done
}

if ! command -v "${CXX:-c++}" >/dev/null; then
    say "note: no C++ compiler (${CXX:-c++}) found; DeepSpeed builds its operators with one (Debian: apt install g++)"
fi

if [[ -e "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" ]]; then
    say ".venv is up to date ($("$VENV/bin/python" -V))"
    exit 0
fi

rm -f "$STAMP"
if ! works "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
fi
remove_interrupted_installations
say "installing craft-ds and its dependencies into .venv (the first time: about 6 GB, several minutes)"
quiet=()
[[ -t 1 ]] || quiet=(--quiet)
"$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --editable ".[$EXTRAS]" \
    || die "pip could not install the packages (see its message above); fix the cause and run this again"
fingerprint >"$STAMP"
say "ready: .venv ($("$VENV/bin/python" -V))"
