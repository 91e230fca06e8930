"""The adapter files of a policy directory, as PEFT and LeRobot read them."""

import dataclasses
import json
from pathlib import Path

import peft

from craft_ds.lora.settings import ADAPTER_CONFIG
from craft_ds.policies.directory import CONFIG


def write_adapter_config(directory: Path, config: peft.LoraConfig) -> None:
    """Write PEFT's configuration beside a policy's, and tell LeRobot that this is an adapter.

    Args:
        directory: Holds the policy's `config.json`.
        config: PEFT's configuration.
    """
    # As PEFT itself stores adapters; who loads them to train says so.
    dataclasses.replace(config, inference_mode=True).save_pretrained(str(directory))
    set_use_peft(directory, True)


def set_use_peft(directory: Path, use_peft: bool) -> None:
    """Say in `config.json` whether LeRobot has to load adapters from this directory."""
    path = directory / CONFIG
    content = json.loads(path.read_text()) | {"use_peft": use_peft}
    path.write_text(json.dumps(content, indent=4) + "\n")


def remove_adapter_config(directory: Path) -> None:
    """Turn a copied policy directory of adapters into that of a whole policy."""
    (directory / ADAPTER_CONFIG).unlink(missing_ok=True)
    set_use_peft(directory, False)
