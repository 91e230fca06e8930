"""A run that other runs resume from."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saving(inputs) -> list[str]:
    """Flags of a CRaFT run of 6 steps with a checkpoint after every second step."""
    return [*inputs.craft_flags(), "--steps=6", "--save_freq=2"]


@pytest.fixture(scope="session")
def unbroken(inputs, saving, tmp_path_factory) -> Path:
    """An uninterrupted run with these flags."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    output = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(output), *saving]))
    return output
