"""Adapters of a policy: planning them, adding them, and their names on disk."""

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
from craft_ds.lora.peft_config import (
    ADAPTER_CONFIG,
    check_adapters_match,
    make_peft_config,
    read_adapter_config,
)
from craft_ds.lora.targets import resolve_pattern
from craft_ds.policies.loading import resolve_policy_path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# PEFT's names of a policy's parameters, once it is wrapped in a PeftModel.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterPlan:
    """Plan of the adapters of a policy, made before the policy is built.

    Attributes:
        config: PEFT's configuration, as it is stored with the adapters.
        base: Local folder of the base policy, whose weights are frozen.
        stored: Folder of the adapters to continue with; None: new ones.
    """

    config: peft.LoraConfig
    base: Path
    stored: Path | None


def has_adapters(directory: Path) -> bool:
    """Return True if a policy directory holds adapters instead of full weights."""
    return (directory / ADAPTER_CONFIG).is_file()


def plan_adapters(lora: LoraConfig, policy: PreTrainedConfig, directory: Path) -> AdapterPlan | None:
    """Plan the adapters that the flags and a policy directory ask for.

    Args:
        lora: Validated flags.
        policy: The policy's configuration, with `pretrained_path` as the user gave it.
        directory: The policy's local folder.

    Returns:
        None for full training.

    Raises:
        UserError: The directory holds adapters and the flags ask for none or for others; their base policy
            is missing; the policy's type has no such preset.
    """
    if not has_adapters(directory):
        if not lora.enabled:
            return None
        path = policy.pretrained_path
        base_path = str(Path(path).resolve()) if path and Path(path).is_dir() else str(path or directory)
        return AdapterPlan(make_peft_config(lora, policy, base_path), directory, None)
    plan = plan_stored_adapters(directory, lora.base_path)
    if not lora.enabled:
        raise UserError(
            f"{directory} holds LoRA adapters (rank {plan.config.r}), but --lora.enabled=false: continue "
            "with them by --lora.enabled=true, or merge them (`craft-ds export --merge_lora`)"
        )
    asked = make_peft_config(lora, policy, str(plan.config.base_model_name_or_path))
    check_adapters_match(asked, plan.config, policy, directory)
    # Dropout changes no shape, so the flag decides.
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, lora_dropout=lora.dropout))


def plan_stored_adapters(directory: Path, base_path: str = "", flag: str = "--lora.base_path") -> AdapterPlan:
    """Plan the adapters of a directory, and locate their base policy.

    Args:
        directory: A policy directory with adapters.
        base_path: Current folder or hub id of the base policy, if it was moved.
        flag: The command's flag for `base_path`, for error messages.

    Raises:
        UserError: The configuration is damaged, or the base policy is missing.
    """
    config = read_adapter_config(directory)
    path = base_path or config.base_model_name_or_path
    if not path:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} names no base policy (base_model_name_or_path): set "
            f"{flag} to its folder or hub id"
        )
    try:
        base = resolve_policy_path(path)
    except UserError as error:
        raise UserError(
            f"the base policy of the adapters in {directory} is missing ({error}): restore it, or set "
            f"{flag} to its folder or hub id"
        ) from error
    if has_adapters(base):
        raise UserError(f"{path}, the base policy of {directory}, holds adapters itself: merge those first")
    if base_path:
        config.base_model_name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else path
    # PEFT marks stored adapters for inference, which would freeze them.
    config.inference_mode = False
    return AdapterPlan(config, base, directory)


def weights_directory(directory: Path) -> Path:
    """Return the directory of a policy's full weights: its own, or that of its adapters' base policy.

    Raises:
        UserError: As `plan_stored_adapters`.
    """
    return plan_stored_adapters(directory).base if has_adapters(directory) else directory


@dataclass(frozen=True)
class Adapters:
    """Adapters that were added to a policy.

    Attributes:
        config: PEFT's configuration.
        keys: Maps each trainable parameter of the policy to its name in `adapter_model.safetensors`.
        base_sha256: SHA-256 of the base policy's weights (`weights_sha256`).
    """

    config: peft.LoraConfig
    keys: Mapping[str, str]
    base_sha256: str = ""

    def describe(self) -> str:
        """Return a short description for the log."""
        kind = "DoRA" if self.config.use_dora else "LoRA"
        return f"{kind} of rank {self.config.r}"


def add_adapters(policy: nn.Module, config: peft.LoraConfig, base_sha256: str = "") -> Adapters:
    """Freeze a policy and add adapters to its target layers, on the meta device.

    Modules that train fully are not copied, as PEFT's own wrapper would do: their parameters keep their names
    and train in place. They are stored under the names that PEFT reads.

    Args:
        policy: A policy without adapters; changed in place.
        config: PEFT's configuration.
        base_sha256: Recorded in the result; empty: not known.

    Raises:
        UserError: A target is missing, is not a linear layer, or trains fully too.
    """
    policy.requires_grad_(False)
    modules_to_save = list(config.modules_to_save or [])
    names = [name for name, _ in policy.named_modules()]
    targets = resolve_pattern(config.target_modules, names, "target_modules")
    if not targets:
        raise UserError(f"--lora.target_modules={config.target_modules}: no module of the policy matches")
    injected = dataclasses.replace(
        config,
        modules_to_save=None,
        target_modules=targets,
        exclude_modules=resolve_pattern(config.exclude_modules, names, "exclude_modules"),
    )
    try:
        peft.inject_adapter_in_model(injected, policy, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"--lora.target_modules={config.target_modules}: {one_line(error)}") from error
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer) and not (
            type(module) is LoraLinear and isinstance(module.get_base_layer(), nn.Linear)
        ):
            kind = type(module.get_base_layer()).__name__
            raise UserError(
                f"--lora.target_modules: {name} is a {kind}, and only linear layers can have adapters; "
                "to train it, name it in --lora.modules_to_save"
            )
    tensors = policy.state_dict(keep_vars=True)
    parameters = {id(tensor): name for name, tensor in tensors.items()}
    # PEFT's names of the stored tensors.
    stored = peft.get_peft_model_state_dict(policy, state_dict=tensors, save_embedding_layers=False)
    keys = {parameters[id(tensor)]: _PREFIX + key for key, tensor in stored.items()}
    for suffix in modules_to_save:
        keys |= _train_fully(policy, suffix)
    return Adapters(config, keys, base_sha256)


def _train_fully(policy: nn.Module, suffix: str) -> dict[str, str]:
    """Make the modules with a name suffix trainable, and map their parameters to PEFT's names."""
    keys = {}
    for module_name, module in policy.named_modules():
        if not module_name.endswith(suffix):
            continue
        for name, parameter in module.named_parameters():
            if "lora_" in name or ".base_layer." in name or isinstance(module, LoraLayer):
                raise UserError(
                    f"--lora.modules_to_save={suffix} has adapters too ({module_name}): remove one of them"
                )
            parameter.requires_grad_(True)
            keys[f"{module_name}.{name}"] = f"{_PREFIX}{module_name}.{name}"
    if not keys:
        raise UserError(f"--lora.modules_to_save={suffix}: the policy has no such module with parameters")
    return keys


def base_name(name: str) -> str | None:
    """Return the name that a tensor has in the base policy; None for an adapter's own tensor."""
    return None if "lora_" in name else name.replace(".base_layer.", ".")
