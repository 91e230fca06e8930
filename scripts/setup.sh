#!/usr/bin/env bash
# Make or reuse .venv beside this repository, with everything that training, the demo and the tests need.
#
#   bash scripts/setup.sh        prepare .venv
#   source scripts/setup.sh      the same, then put .venv first on PATH (demo.sh, test.sh and .ci/run do this)
#
# PYTHON=/path/to/python3.12 picks the interpreter. A second call is over in a moment: a stamp in .venv
# remembers what was installed.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: the work runs in a process of its own, so that its strict mode does not leak into the caller.
    bash "${BASH_SOURCE[0]}" || return 1
    VIRTUAL_ENV="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
    export VIRTUAL_ENV
    export PATH="$VIRTUAL_ENV/bin:$PATH"                # DeepSpeed looks for ninja on PATH
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

# A name on PATH proves nothing (pyenv leaves shims for versions that are switched off): run it.
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

# What an installed .venv depends on; empty when .venv has no Python that runs.
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
        say "making .venv with $python ($("$python" -V))"
        "$python" -m venv --clear "$VENV"
    elif command -v uv >/dev/null; then
        say "no Python 3.12 or 3.13 here; uv brings one"
        uv venv --quiet --clear --seed --python 3.12 "$VENV"
    else
        die "no Python 3.12 or 3.13 with venv found: install one (Debian: apt install python3.12-venv; else" \
            "'pyenv install 3.12' or 'pip install uv'), or set PYTHON=/path/to/python3.12"
    fi
}

# pip writes INSTALLER after a package's files: where it is missing, the installation was cut off, and pip
# would take the package for whole.
forget_half_installed() {
    local info
    for info in "$VENV"/lib/python3.*/site-packages/*.dist-info; do
        if [[ -d "$info" && ! -e "$info/INSTALLER" ]]; then
            say "repairing $(basename "$info" .dist-info), whose installation was cut off"
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
forget_half_installed
say "installing craft-ds and its dependencies into .venv (the first time: about 6 GB, several minutes)"
quiet=()
[[ -t 1 ]] || quiet=(--quiet)
"$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check --editable ".[$EXTRAS]" \
    || die "pip could not install the packages (its reason is above); mend it and run this again"
fingerprint >"$STAMP"
say "ready: .venv ($("$VENV/bin/python" -V))"
