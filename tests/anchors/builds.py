"""Helpers of the tests that build anchor caches."""

from pathlib import Path

import pytest

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.cli import run_command
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
    """Run `craft-ds anchors` in this process; return its exit code."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        run_command("anchors", arguments)
    except SystemExit as ended:
        return ended.code
    return 0
