"""Protection from policy directories that would make this process run code from their files.

LeRobot imports any class that a processor's file names, and lets transformers run the Python files beside a
tokenizer. Some of its policies and processor steps load further models that the files name. A downloaded
policy should not be able to run a program: what is not listed here as harmless is refused.
"""

import os
import sys
from pathlib import Path
from typing import Any

import transformers.dynamic_module_utils
from lerobot.configs import PreTrainedConfig
from lerobot.processor import ProcessorStep, ProcessorStepRegistry

from craft_ds.errors import UserError
from craft_ds.tensor_io.safe_json import read_object

TRUST_VARIABLE = "CRAFT_DS_TRUST_REMOTE_CODE"
# Hub repositories of FAST tokenizers contain code; PaliGemma's and SmolVLM's (HuggingFaceTB) do not.
_TRUSTED_OWNERS = ("google", "HuggingFaceTB", "lerobot", "physical-intelligence")
# PaliGemma's tokenizer.json has 18 MB, Gemma 3's 33 MB.
_MOST_TOKENIZER_BYTES = 1 << 26
_OWN_PROCESSOR = "FastActionProcessor"
# LeRobot's policies whose constructors load nothing but what `NAMES` names.
_POLICIES = ("act", "diffusion", "pi0", "pi05", "pi0_fast", "smolvla", "tdmpc", "vqbet")
# Fields of their configurations, and of the steps below, that name a folder or a hub repository.
NAMES = (
    "text_tokenizer_name",
    "action_tokenizer_name",
    "tokenizer_name",
    "paligemma_tokenizer_name",
    "vlm_model_name",
)
# LeRobot's steps that compute with numbers and texts, or load a tokenizer that `NAMES` names.
_STEPS = (
    "absolute_actions_processor",
    "action_tokenizer_processor",
    "device_processor",
    "evo1_action_processor",
    "evo1_pad_action_processor",
    "evo1_pad_state_processor",
    "normalizer_processor",
    "numpy2torch_action_processor",
    "observation_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_fast_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    "relative_actions_processor",
    "rename_observations_processor",
    "smolvla_new_line_processor",
    "to_batch_processor",
    "to_batch_processor_action",
    "to_batch_processor_complementary_data",
    "to_batch_processor_observation",
    "tokenizer_processor",
    "torch2numpy_action_processor",
    "unnormalizer_processor",
    "xvla_add_domain_id",
    "xvla_image_scale",
    "xvla_image_to_float",
    "xvla_imagenet_normalize",
    "xvla_rotation_6d_to_axis_angle",
)

# transformers would ask on the terminal whether to run code, and wait; this makes it an error.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def is_trusted() -> bool:
    """Return True if the user trusts the code of all policies (`CRAFT_DS_TRUST_REMOTE_CODE=1`)."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def check_policy_type(name: object, file: Path) -> None:
    """Check that building a policy of this type loads nothing that its configuration could choose.

    A policy that the user has registered is the user's own code.

    Args:
        name: The type in the configuration.
        file: The configuration, for the error message.

    Raises:
        UserError: The type is one of LeRobot's others, which may run code from the hub.
    """
    known = PreTrainedConfig.get_known_choices()
    if is_trusted() or not isinstance(name, str) or name not in known:  # LeRobot refuses unknown types
        return
    if name not in _POLICIES and known[name].__module__.startswith("lerobot."):
        raise UserError(_complaint(f"a policy of type {name} ({file}) may load and run code from the hub"))


def check_step(step: dict[str, Any], file: Path) -> None:
    """Check that a processor step is harmless, or of a class that the user has already imported.

    Args:
        step: The entry of the step in the file.
        file: The file, for the error message.

    Raises:
        UserError: The step may load and run code, would import a module, or is not a processor step.
    """
    if "registry_name" in step:
        name = str(step["registry_name"])
        registered = name in ProcessorStepRegistry.list()  # LeRobot refuses the others
        if is_trusted() or not registered or name in _STEPS:
            return
        if ProcessorStepRegistry.get(name).__module__.startswith("lerobot."):
            raise UserError(_complaint(f"the step {name} of {file} may load and run code"))
        return
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
    if is_trusted():
        return
    folder = Path(name)
    if not folder.is_dir():
        if name.partition("/")[0] not in _TRUSTED_OWNERS:
            raise UserError(_complaint(f"the tokenizer '{name}' that {named_in} names may run code"))
        return
    for file in sorted(folder.rglob("*")):
        if not (file.is_file() or (file.is_dir() and not file.suffix)):
            raise UserError(f"{file} is not a regular file: remove it, or replace it by the policy's own")
        if (
            file.suffix in (".json", ".txt", ".model", ".jinja")
            and file.stat().st_size > _MOST_TOKENIZER_BYTES
        ):
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, more than any tokenizer: use the original file"
            )
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
