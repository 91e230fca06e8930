"""Shipped teachers hold a copy of the action tokenizer's class, for processes without craft_ds."""

from pathlib import Path

import pytest

import craft_ds.policies.tiny_pi0_fast.fast_tokenizer
import craft_ds.worlds

ASSETS = Path(craft_ds.worlds.__file__).parent / "assets"


@pytest.mark.parametrize("teacher", ["metaworld_teacher", "blocks_teacher"])
def test_the_copy_equals_the_source(teacher):
    copy = ASSETS / teacher / "action_tokenizer" / "fast.py"
    assert copy.read_text() == Path(craft_ds.policies.tiny_pi0_fast.fast_tokenizer.__file__).read_text()
