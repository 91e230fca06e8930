"""Protection from policy directories that would make this process run code from their files.

LeRobot imports any class that a processor's file names, and lets transformers run the Python files beside a
tokenizer. A downloaded policy should not be able to run a program.
"""

import os
import sys
from pathlib import Path
from typing import Any

from lerobot.processor import ProcessorStep

from craft_ds.errors import UserError
from craft_ds.tensor_io.safe_json import read_object

TRUST_VARIABLE = "CRAFT_DS_TRUST_REMOTE_CODE"
# Hub repositories of FAST tokenizers contain code; PaliGemma's and SmolVLM's (HuggingFaceTB) do not.
_TRUSTED_OWNERS = ("google", "HuggingFaceTB", "lerobot", "physical-intelligence")
_OWN_PROCESSOR = "FastActionProcessor"


def check_step(step: dict[str, Any], file: Path) -> None:
    """Check that the class of a processor step is already imported.

    Args:
        step: The entry of the step in the file.
        file: The file, for the error message.

    Raises:
        UserError: The entry would import a module, or call something that is not a processor step.
    """
    if "registry_name" in step:
        return  # LeRobot accepts the names of its own registry only
    module, _, name = str(step.get("class")).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, ProcessorStep)):
        raise UserError(
            f"{file} names the class '{module}.{name}', which is not a registered processor step "
            "and is not imported: register your own steps before training"
        )


def check_tokenizer(name: str, named_in: Path | str) -> None:
    """Check that a tokenizer contains no Python code, or that its code is trusted.

    The embedded FAST tokenizer has a copy of its class beside it for stock LeRobot, which is never run here.

    Args:
        name: A folder or a hub id.
        named_in: The file that names it, for the error message.

    Raises:
        UserError: It contains code, is not from the publishers of pi0_fast's tokenizers, and the environment
            does not allow it; or its folder cannot be read safely.
    """
    if os.environ.get(TRUST_VARIABLE) == "1":
        return
    folder = Path(name)
    if not folder.is_dir():
        if name.partition("/")[0] not in _TRUSTED_OWNERS:
            raise UserError(_complaint(f"the tokenizer '{name}' that {named_in} names may run code"))
        return
    for file in sorted(folder.rglob("*")):
        if not (file.is_file() or (file.is_dir() and not file.suffix)):
            raise UserError(f"{file} is not a regular file: remove it, or replace it by the policy's own")
        if file.suffix == ".json" and "config" in file.name and _runs_code(file):
            raise UserError(_complaint(f"{file} (auto_map) asks to run Python code from its folder"))


def _runs_code(file: Path) -> bool:
    try:
        content = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    code = content.get("auto_map")
    if not code:
        return False
    return not (content.get("processor_class") == _OWN_PROCESSOR and [*code] == ["AutoProcessor"])


def _complaint(what: str) -> str:
    return f"{what}: set {TRUST_VARIABLE}=1 if you have read that code and trust it"
