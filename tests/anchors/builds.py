"""What tests of building anchor caches share beside their fixtures."""

import importlib.util
import sys
from pathlib import Path

import pytest

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.cli import run_main
from craft_ds.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_anchor_cache.py"


class Killed(BaseException):
    """Stands for the process's end: the build has no handlers that could tidy up behind it."""


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refuses(options, *words):
    with pytest.raises(UserError) as caught:
        build_anchor_cache(options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def run_script(monkeypatch, *arguments):
    """Run the script's `main` as the script does; return its exit status."""
    spec = importlib.util.spec_from_file_location("build_anchor_cache", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        run_main(script.main)
    except SystemExit as leaving:
        return leaving.code
    return 0
