"""Strict loading of a policy directory or a hub policy: a missing or mismatching part is an error.

LeRobot's `from_pretrained` prints a line and returns a partly random model when a file or a key is missing;
the functions here raise an error.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from transformers import AutoProcessor, AutoTokenizer

from craft_ds.errors import UserError, exits_as_user_error, one_line
from craft_ds.policies.changes import PolicyChanges, StepFields, match_saved_steps
from craft_ds.policies.directory import (
    ACTION_STEPS,
    CONFIG,
    POSTPROCESSOR,
    PREPROCESSOR,
    read_config,
    read_pipeline,
)
from craft_ds.policies.lerobot_internals import check_internals
from craft_ds.policies.meta_init import build_on_meta, materialize_
from craft_ds.policies.remote_code import NAMES, check_policy_type, check_step, check_tokenizer
from craft_ds.policies.tiny_pi0_fast.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER, reroot_tokenizers
from craft_ds.policies.weights import WEIGHTS_INDEX, WeightReader, is_per_rank, unique_tensors, weight_files
from craft_ds.tensor_io.filesystem import no_temporary_files
from craft_ds.tensor_io.tensor_file import ReadRange, fill_

# Upper bounds of the sizes and the number of layers in a policy's configuration.
_MAX_SIZE, _MAX_LAYERS = 1 << 24, 1000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    CONFIG,
    "policy_*",
    "model*.safetensors",
    "adapter_*",
    WEIGHTS_INDEX,
    f"{TEXT_TOKENIZER}/*",
    f"{ACTION_TOKENIZER}/*",
]


def resolve_policy_path(path: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a policy: `path` itself, or the downloaded snapshot of a hub policy.

    Args:
        path: A folder, or a hub id.
        revision: Commit, branch or tag of a hub policy; not used for a folder.

    Raises:
        UserError: `path` is not a folder, and not a hub policy that can be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"policy path '{path}' is not a folder, and not a hub id like lerobot/pi0fast-base")
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"policy path '{path}' is not a local folder, and cannot be fetched from the hub: {reason}"
        ) from error


def load_policy_config(path: str | Path, cli_overrides: list[str] | None = None) -> PreTrainedConfig:
    """Load a policy's configuration, with the tokenizers of its own directory if it has them.

    Args:
        path: A policy directory or a hub id.
        cli_overrides: Flags in draccus' form without the `policy.` prefix, such as `--dtype=bfloat16`.

    Raises:
        UserError: There is no readable configuration of a known policy type, or a tokenizer is missing.
    """
    directory = resolve_policy_path(path)
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory / CONFIG} is missing: '{path}' is not a policy directory")
    overrides = cli_overrides or []
    check_policy_type(read_config(directory).get("type"), directory / CONFIG)
    try:
        with exits_as_user_error(), no_temporary_files():
            config = PreTrainedConfig.from_pretrained(directory, cli_overrides=overrides)
    except Exception as error:
        flags = " with " * bool(overrides) + " ".join(f"--policy.{flag[2:]}" for flag in overrides)
        reason = one_line(error)
        raise UserError(f"{directory / CONFIG}{flags} is not a policy configuration: {reason}") from error
    asked = {
        field: getattr(config, field, None) for field in ("text_tokenizer_name", "action_tokenizer_name")
    }
    reroot_tokenizers(config, directory)
    for field, name in asked.items():
        if any(flag.startswith(f"--{field}=") for flag in overrides) and name != getattr(config, field):
            raise UserError(
                f"--policy.{field}={name}: {directory} has its own tokenizer in "
                f"{Path(getattr(config, field)).name}/, with which it was trained: omit the flag"
            )
    for field in ("text_tokenizer_name", "action_tokenizer_name"):
        name = getattr(config, field, None)
        # transformers would query the hub for minutes before rejecting such a name.
        if name and not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
            raise UserError(f"{directory / CONFIG}: {field} '{name}' is neither a folder nor a hub id")
    _check_tokenizers(config, directory / CONFIG)
    return config


def _check_tokenizers(config: PreTrainedConfig, named_in: Path | str = "the policy's configuration") -> None:
    for field in NAMES:
        if name := getattr(config, field, None):
            check_tokenizer(name, named_in)


def check_action_steps(config: PreTrainedConfig) -> None:
    """Check that a policy which decodes tokens acts with all the actions that its tokens encode.

    LeRobot's pi0_fast decodes `n_action_steps` actions from tokens of `chunk_size`: with fewer steps, perfect
    tokens give wrong actions.

    Raises:
        UserError: The two differ.
    """
    if isinstance(config, PI0FastConfig) and config.n_action_steps != config.chunk_size:
        raise UserError(
            f"--policy.n_action_steps={config.n_action_steps} and --policy.chunk_size={config.chunk_size}: "
            f"{config.type} decodes its tokens as n_action_steps actions, so set both to the same number"
        )


def policy_cameras(config: PreTrainedConfig) -> list[str]:
    """Return the batch keys of the policy's real cameras, in the policy's order.

    Empty cameras, which the policy itself fills with blank images, are not in data sets.
    """
    return [name for name in config.image_features if ".empty_camera_" not in name]


def load_policy(config: PreTrainedConfig, path: str | Path, device: str = "cpu") -> PreTrainedPolicy:
    """Build a policy and read all its weights.

    Args:
        config: From `load_policy_config`; not changed.
        path: A policy directory or a hub id.
        device: Device of the policy.

    Returns:
        The policy in evaluation mode.

    Raises:
        UserError: A tokenizer cannot be loaded, a weight file is missing or damaged, or names or
            shapes do not match.
    """
    directory = resolve_policy_path(path)
    policy = build_policy(config, directory)
    with WeightReader(directory, policy) as weights:
        fill_policy_(policy, weights.read, device)
    return policy


@torch.no_grad()
def fill_policy_(policy: PreTrainedPolicy, read: ReadRange, device: str) -> None:
    """Allocate the memory of a policy on a device and read its values.

    Args:
        policy: From `build_policy`.
        read: Reads its parameters and persistent buffers by range.
        device: Device of the policy.
    """
    materialize_(policy, device)
    policy.config.device = device
    for name, tensor in unique_tensors(policy).items():
        fill_(tensor.view(-1), read, name, 0)


def build_policy(config: PreTrainedConfig, directory: Path) -> PreTrainedPolicy:
    """Build a policy on the meta device (see `build_on_meta`) after checking that its weight files exist.

    Raises:
        UserError: A weight file is missing, or the policy cannot be built (a tokenizer cannot be loaded).
    """
    if not is_per_rank(directory):
        weight_files(directory)
    _check_sizes(config, directory)
    _check_tokenizers(config)
    try:
        policy = build_on_meta(config)
    except Exception as error:  # constructors and tokenizers raise many types for unexpected values
        raise UserError(
            f"cannot build the policy of '{directory}': {one_line(error.__cause__ or error)}"
        ) from error
    check_internals(policy)
    return policy


def _check_sizes(config: PreTrainedConfig, directory: Path) -> None:
    """Refuse absurd sizes before memory and time are spent: a file may hold any number."""
    for name, value in vars(config).items():
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        size = math.prod(abs(number) for number in numbers if type(number) is int)
        most = _MAX_LAYERS if name.endswith(("depth", "layers")) else _MAX_SIZE
        if size > most and not name.endswith(("steps", "seed")):
            raise UserError(f"{directory}: the policy's {name}={value} is too large")


def load_processors(
    config: PreTrainedConfig,
    path: str | Path,
    device: str = "cpu",
    changes: PolicyChanges | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Load the frozen processors of a policy, with the statistics of its training.

    The tokenizer steps get their names and offsets from `config`: LeRobot's action tokenizer step does not
    save two of them, and without them would map every action to another token.

    Args:
        config: From `load_policy_config`.
        path: A policy directory or a hub id.
        device: Device on which the preprocessor puts the batch.
        changes: What a run changes in the saved processors; None: nothing.

    Returns:
        The preprocessor and the postprocessor.

    Raises:
        UserError: A file is missing or cannot be read, or cannot be changed as asked.
    """
    directory = resolve_policy_path(path)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: '{path}' has no saved processors")
    _check_tokenizers(config)
    overrides = _overrides(config, device)
    changes = changes or PolicyChanges()
    try:
        names = _check_steps(directory / PREPROCESSOR, overrides)
        overrides = {name: fields for name, fields in overrides.items() if name in names}
        before = match_saved_steps(changes.preprocessor, names, directory / PREPROCESSOR)
        normalises = "normalizer_processor" in names
        names = _check_steps(directory / POSTPROCESSOR, {})
        mode = config.normalization_mapping.get("ACTION", NormalizationMode.IDENTITY)
        if normalises and mode != NormalizationMode.IDENTITY and "unnormalizer_processor" not in names:
            raise ValueError(
                f"{POSTPROCESSOR} has no unnormalizer_processor, but the policy's actions are normalized"
            )
        after = match_saved_steps(changes.postprocessor, names, directory / POSTPROCESSOR)
        return make_pre_post_processors(
            config,
            pretrained_path=str(directory),
            preprocessor_overrides=_merged(before, overrides),
            postprocessor_overrides=after,
        )
    except Exception as error:
        raise UserError(f"cannot load the processors of '{path}': {one_line(error)}") from error


def _merged(one: StepFields, other: StepFields) -> StepFields:
    return {name: one.get(name, {}) | other.get(name, {}) for name in one.keys() | other.keys()}


def _check_steps(file: Path, overrides: dict[str, dict[str, Any]]) -> set[str]:
    """Check the classes and tokenizers of a processor's steps; return their registered names."""
    names = set()
    for step in read_pipeline(file)["steps"]:
        check_step(step, file)
        name = str(step.get("registry_name"))
        names.add(name)
        for field, value in (step.get("config", {}) | overrides.get(name, {})).items():
            if field in NAMES and value:
                check_tokenizer(str(value), file)
    return names


def _overrides(config: PreTrainedConfig, device: str) -> dict[str, dict[str, Any]]:
    """Return constructor arguments, by step name, that may be wrong in a saved preprocessor."""
    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": device}}
    if hasattr(config, "action_tokenizer_name"):
        overrides["tokenizer_processor"] = {"tokenizer_name": config.text_tokenizer_name}
        for step in ACTION_STEPS:
            overrides[step] = {
                "action_tokenizer_name": config.action_tokenizer_name,
                "paligemma_tokenizer_name": config.text_tokenizer_name,
                "fast_skip_tokens": config.fast_skip_tokens,
            }
    return overrides


def tokenizer_fingerprint(config: PreTrainedConfig) -> str:
    """Return a SHA-256 of all that decides the token ids of a policy, independent of tokenizer folders.

    Args:
        config: From `load_policy_config`.

    Raises:
        UserError: A tokenizer cannot be loaded.
    """
    content: dict[str, Any] = {
        field: getattr(config, field, None)
        for field in ("fast_skip_tokens", "tokenizer_max_length", "max_action_tokens")
    }
    if hasattr(config, "action_tokenizer_name"):
        _check_tokenizers(config)
        try:
            text = AutoTokenizer.from_pretrained(config.text_tokenizer_name)
            action = AutoProcessor.from_pretrained(config.action_tokenizer_name, trust_remote_code=True)
            content["text"] = _backend(text)
            content["action"] = _backend(action.bpe_tokenizer)
        except Exception as error:
            raise UserError(
                f"cannot load the tokenizers '{config.text_tokenizer_name}' and "
                f"'{config.action_tokenizer_name}': {one_line(error)}"
            ) from error
        content |= {
            f"action_{field}": getattr(action, field, None) for field in ("scale", "min_token", "max_token")
        }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _backend(tokenizer: Any) -> dict[str, Any]:
    """Serialise a tokenizer without the padding and truncation of its last call."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
