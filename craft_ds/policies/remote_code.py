"""No file of a policy directory makes this process run code that is not installed here.

LeRobot imports whatever class a processor's file names, and lets transformers run the Python files beside a
tokenizer. Who downloads a policy does not expect its files to be programs.
"""

import os
import sys
from pathlib import Path
from typing import Any

from lerobot.processor import ProcessorStep

from craft_ds.errors import UserError
from craft_ds.tensor_io.safe_json import read_object

TRUST_VARIABLE = "CRAFT_DS_TRUST_REMOTE_CODE"
# FAST tokenizers come with code in the hub's form of them; PaliGemma's comes without.
_TRUSTED_OWNERS = ("google", "lerobot", "physical-intelligence")
_OWN_PROCESSOR = "FastActionProcessor"


def check_step(step: dict[str, Any], file: Path) -> None:
    """Check that a step of a processor is of a class that is loaded already.

    Args:
        step: Its entry in the file.
        file: The file, for the message.

    Raises:
        UserError: The entry would import a module, or call something that is no processor step.
    """
    if "registry_name" in step:
        return  # LeRobot knows no other names than those of its own registry
    module, _, name = str(step.get("class")).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, ProcessorStep)):
        raise UserError(
            f"{file} names the class '{module}.{name}', which is no processor step known here: it is not "
            "imported; register your own steps before training"
        )


def check_tokenizer(name: str, named_in: Path | str) -> None:
    """Check that a tokenizer brings no Python code with it, or may.

    The embedded FAST tokenizer has a copy of its class beside it for stock LeRobot, which is never run here.

    Args:
        name: A folder or a hub id.
        named_in: What names it, for the message.

    Raises:
        UserError: It does, is not from those who publish the tokenizers of pi0_fast, and the environment does
            not allow it; or its folder cannot be read safely.
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
            raise UserError(f"{file} is no regular file: remove it, or put the policy's own in its place")
        if file.suffix == ".json" and "config" in file.name and _runs_code(file):
            raise UserError(_complaint(f"{file} (auto_map) asks to run Python code that lies beside it"))


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
