"""docs/configuration.md is the text that docs/generate_configuration.py generates."""

import importlib.util
from pathlib import Path

from craft_ds.config.suggestions import own_flags

GENERATOR = Path(__file__).resolve().parents[2] / "docs" / "generate_configuration.py"


def test_configuration_page_is_generated():
    spec = importlib.util.spec_from_file_location("generate_configuration", GENERATOR)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = generator.PAGE.read_text(encoding="utf-8")
    assert page == generator.render(), "run `python docs/generate_configuration.py` and commit the page"


def test_configuration_page_has_a_row_for_every_flag():
    rows = GENERATOR.with_name("configuration.md").read_text(encoding="utf-8").splitlines()
    for flag in own_flags():
        assert sum(row.startswith(f"| `{flag}` |") for row in rows) == 1, flag
