"""Adapters of a policy: what is planned, how they get into it, what they are called on disk."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
from lerobot.configs import PreTrainedConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from craft_ds.config.configs import LoraConfig
from craft_ds.errors import UserError, one_line
from craft_ds.lora.peft_config import ADAPTER_CONFIG, check_same, read_stored, to_peft
from craft_ds.policies.loading import resolve_policy_path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# PEFT's names of a policy's parameters, once it is wrapped in a PeftModel.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterPlan:
    """Adapters that a policy will get, known before it is built.

    Attributes:
        config: PEFT's configuration, as it is stored with the adapters.
        base: Local folder of the base policy, whose weights stay as they are.
        stored: Folder of the adapters to go on with; None: new ones.
    """

    config: peft.LoraConfig
    base: Path
    stored: Path | None


def has_adapters(directory: Path) -> bool:
    """Whether a policy directory holds adapters instead of whole weights."""
    return (directory / ADAPTER_CONFIG).is_file()


def plan_adapters(lora: LoraConfig, policy: PreTrainedConfig, directory: Path) -> AdapterPlan | None:
    """What the flags and a policy directory ask for together.

    Args:
        lora: Validated flags.
        policy: The policy's configuration, with `pretrained_path` as the user gave it.
        directory: The policy's local folder.

    Returns:
        None for full training.

    Raises:
        UserError: The directory holds adapters and the flags ask for none, or for others; their base policy
            is not there; the policy's type has no such preset.
    """
    if not has_adapters(directory):
        if not lora.enabled:
            return None
        path = policy.pretrained_path
        base_path = str(Path(path).resolve()) if path and Path(path).is_dir() else str(path or directory)
        return AdapterPlan(to_peft(lora, policy, base_path), directory, None)
    plan = plan_stored(directory, lora.base_path)
    if not lora.enabled:
        raise UserError(
            f"{directory} holds LoRA adapters (rank {plan.config.r}), but --lora.enabled=false: go on with "
            "them by --lora.enabled=true, or merge them first (scripts/export_checkpoint.py --merge_lora)"
        )
    asked = to_peft(lora, policy, str(plan.config.base_model_name_or_path))
    check_same(asked, plan.config, policy, directory)
    # Dropout changes no shape: the flag counts.
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, lora_dropout=lora.dropout))


def plan_stored(directory: Path, base_path: str = "", flag: str = "--lora.base_path") -> AdapterPlan:
    """The adapters of a directory, and where their base policy lies.

    Args:
        directory: A policy directory with adapters.
        base_path: Where the base policy lies now, if it was moved.
        flag: What the command calls `base_path`.

    Raises:
        UserError: The configuration is damaged, or the base policy is not there.
    """
    config = read_stored(directory)
    path = base_path or config.base_model_name_or_path
    if not path:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} names no base policy (base_model_name_or_path): say where it is "
            f"by {flag}"
        )
    try:
        base = resolve_policy_path(path)
    except UserError as error:
        raise UserError(
            f"the base policy of the adapters in {directory} is not there ({error}): put it back, or say "
            f"where it is by {flag}"
        ) from error
    if has_adapters(base):
        raise UserError(f"{path}, the base policy of {directory}, holds adapters itself: merge those first")
    if base_path:
        config.base_model_name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else path
    # PEFT marks what it stores for inference: adapters made from it would all be frozen.
    config.inference_mode = False
    return AdapterPlan(config, base, directory)


def weights_directory(directory: Path) -> Path:
    """Where a policy's whole weights lie: in its directory, or in that of its adapters' base.

    Raises:
        UserError: As `plan_stored`.
    """
    return plan_stored(directory).base if has_adapters(directory) else directory


@dataclass(frozen=True)
class Adapters:
    """The adapters in a policy.

    Attributes:
        config: PEFT's configuration.
        keys: For each trainable parameter of the policy, its name in `adapter_model.safetensors`.
        base_sha256: Of the base policy's weights (`weights_sha256`).
    """

    config: peft.LoraConfig
    keys: Mapping[str, str]
    base_sha256: str = ""

    def describe(self) -> str:
        """A few words for the log."""
        kind = "DoRA" if self.config.use_dora else "LoRA"
        return f"{kind} of rank {self.config.r}"


def add_adapters(policy: nn.Module, config: peft.LoraConfig, base_sha256: str = "") -> Adapters:
    """Freeze a policy and put adapters beside its target layers, on the meta device and without values.

    The modules that train fully are not doubled as PEFT's own wrapper would: their parameters keep their
    names and train in place. They are stored under the names that PEFT reads.

    Args:
        policy: A policy without adapters; changed in place.
        config: PEFT's configuration.
        base_sha256: Recorded in the result; empty: not known.

    Raises:
        UserError: A target is missing, is no linear layer, or trains fully too.
    """
    policy.requires_grad_(False)
    full_modules = list(config.modules_to_save or [])
    try:
        peft.inject_adapter_in_model(
            dataclasses.replace(config, modules_to_save=None), policy, low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise UserError(f"--lora.target_modules={config.target_modules}: {one_line(error)}") from error
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer) and not (
            type(module) is LoraLinear and isinstance(module.get_base_layer(), nn.Linear)
        ):
            kind = type(module.get_base_layer()).__name__
            raise UserError(
                f"--lora.target_modules: {name} is a {kind}, and only linear layers can have adapters; "
                "to train it, name it in --lora.full_modules"
            )
    tensors = policy.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in tensors.items()}
    # PEFT's own naming of what it stores.
    stored = peft.get_peft_model_state_dict(policy, state_dict=tensors, save_embedding_layers=False)
    keys = {names[id(tensor)]: _PREFIX + key for key, tensor in stored.items()}
    for suffix in full_modules:
        keys |= _train_fully(policy, suffix)
    return Adapters(config, keys, base_sha256)


def _train_fully(policy: nn.Module, suffix: str) -> dict[str, str]:
    """Let the modules that a suffix names train, and name their parameters as PEFT's `modules_to_save`."""
    keys = {}
    for module_name, module in policy.named_modules():
        if not module_name.endswith(suffix):
            continue
        for name, parameter in module.named_parameters():
            if "lora_" in name or ".base_layer." in name or isinstance(module, LoraLayer):
                raise UserError(
                    f"--lora.full_modules={suffix} has adapters too ({module_name}): leave one of them out"
                )
            parameter.requires_grad_(True)
            keys[f"{module_name}.{name}"] = f"{_PREFIX}{module_name}.{name}"
    if not keys:
        raise UserError(f"--lora.full_modules={suffix}: the policy has no such module with parameters")
    return keys


def base_name(name: str) -> str | None:
    """Return the name that a tensor has in the base policy; None for an adapter's own tensor."""
    return None if "lora_" in name else name.replace(".base_layer.", ".")
