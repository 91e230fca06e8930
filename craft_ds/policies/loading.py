"""Strict loading of a policy directory or a hub policy: what is missing or does not fit is an error.

LeRobot's ``from_pretrained`` prints a line and returns a part-random model when a file or a key is missing;
nothing here does.
"""

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, AutoTokenizer
from transformers.initialization import no_init_weights

from craft_ds.errors import UserError, exits_as_user_error
from craft_ds.policies.directory import (
    ACTION_STEPS,
    CONFIG,
    POSTPROCESSOR,
    PREPROCESSOR,
    WEIGHTS,
)
from craft_ds.policies.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER, reroot_tokenizers

WEIGHTS_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    CONFIG,
    "policy_*",
    "model*.safetensors",
    WEIGHTS_INDEX,
    f"{TEXT_TOKENIZER}/*",
    f"{ACTION_TOKENIZER}/*",
]


def resolve_policy_path(path: str | Path) -> Path:
    """The local folder of a policy: itself, or the snapshot of a hub policy (downloaded when needed).

    Raises:
        UserError: If ``path`` is no folder, and no hub policy that can be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"policy path '{path}' is not a folder, and not a hub id like lerobot/pi0fast-base")
    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"policy path '{path}' is not a folder here, and not fetched from the hub: {reason}"
        ) from error


def load_policy_config(path: str | Path, cli_overrides: list[str] | None = None) -> PreTrainedConfig:
    """A policy's configuration, with the tokenizers of its own directory where it has them.

    Args:
        path: A policy directory or a hub id.
        cli_overrides: Flags in draccus' form without the ``policy.`` prefix, such as ``--dtype=bfloat16``.

    Raises:
        UserError: If there is no readable configuration of a known policy type, or a tokenizer is missing.
    """
    directory = resolve_policy_path(path)
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory / CONFIG} is missing: '{path}' is not a policy directory")
    overrides = cli_overrides or []
    try:
        with exits_as_user_error():
            config = PreTrainedConfig.from_pretrained(directory, cli_overrides=overrides)
    except Exception as error:
        flags = " with " * bool(overrides) + " ".join(f"--policy.{flag[2:]}" for flag in overrides)
        reason = _one_line(error)
        raise UserError(f"{directory / CONFIG}{flags} is not a policy configuration: {reason}") from error
    reroot_tokenizers(config, directory)
    for field in ("text_tokenizer_name", "action_tokenizer_name"):
        name = getattr(config, field, None)
        # transformers would ask the hub for minutes before giving up on such a name.
        if name and not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
            raise UserError(f"{directory / CONFIG}: {field} '{name}' is neither a folder nor a hub id")
    return config


def policy_cameras(config: PreTrainedConfig) -> list[str]:
    """The batch keys of the policy's real cameras, in the policy's order.

    Empty cameras, which the policy fills with blank images itself, are in no data set.
    """
    return [name for name in config.image_features if ".empty_camera_" not in name]


def load_policy(config: PreTrainedConfig, path: str | Path, device: str = "cpu") -> PreTrainedPolicy:
    """Build a policy and read its weights, all of them or none.

    Args:
        config: From ``load_policy_config``; not changed.
        path: A policy directory or a hub id.
        device: Where the policy goes.

    Returns:
        The policy in evaluation mode.

    Raises:
        UserError: If a tokenizer cannot be loaded, a weight file is missing or damaged, or names or shapes do
            not fit.
    """
    directory = resolve_policy_path(path)
    weight_files(directory)
    config = copy.copy(config)
    config.device = device
    try:
        # The weights are read below: drawing random ones first would only cost time.
        with no_init_weights():
            policy = get_policy_class(config.type)(config)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"cannot build the policy of '{path}': {_one_line(error.__cause__ or error)}"
        ) from error

    tensors = policy.state_dict()
    located = locate_weights(directory, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (file, key) in located.items():
        by_file.setdefault(file, []).append((name, key))
    for file, pairs in by_file.items():
        with safe_open(file, framework="pt") as reader, torch.no_grad():
            for name, key in pairs:
                tensors[name].copy_(reader.get_tensor(key))
    return policy.to(device).eval()


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a policy directory: ``model.safetensors``, or those that the index names.

    Raises:
        UserError: If there is neither, or the index names a file that is not there.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        raise UserError(f"{directory / WEIGHTS} is missing: the policy has no weights")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {_one_line(error)}") from error
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {index} names it")
    return files


def locate_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a policy lies.

    Names may lack the leading ``model.``, and ``embed_tokens`` may be missing where it equals ``lm_head``, as
    in LeRobot's and openpi's own files.

    Args:
        directory: A policy directory.
        shapes: The policy's state dictionary: names and shapes.

    Returns:
        For each name, the file and the key to give to ``safe_open(file).get_slice(key)``.

    Raises:
        UserError: If names or shapes of the files and of the policy differ, or a file is damaged.
    """
    found: dict[str, tuple[Path, str]] = {}
    found_shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 - no mapping
                    name = key if key in shapes or key.startswith("model.") else f"model.{key}"
                    found[name] = (file, key)
                    found_shapes[name] = tuple(reader.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file: {_one_line(error)}") from error

    for name in shapes:
        head = name.replace(_EMBEDDING, "lm_head.weight")
        if name.endswith(_EMBEDDING) and name not in found and head in found:
            found[name], found_shapes[name] = found[head], found_shapes[head]

    where = directory / WEIGHTS if (directory / WEIGHTS).is_file() else directory / WEIGHTS_INDEX
    for problem, names in (
        ("lacks", shapes.keys() - found.keys()),
        ("has unknown", found.keys() - shapes.keys()),
        ("has another shape for", {n for n in shapes.keys() & found.keys() if shapes[n] != found_shapes[n]}),
    ):
        if names:
            more = ", …" if len(names) > 3 else ""
            raise UserError(
                f"{where} {problem} {len(names)} tensors of the policy: {', '.join(sorted(names)[:3])}{more}"
            )
    return found


def load_processors(
    config: PreTrainedConfig, path: str | Path, device: str = "cpu"
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The frozen processors of a policy, with the statistics they were trained with.

    The tokenizer steps get their names and offsets from ``config``: LeRobot's saved action tokenizer step has
    lost two of them, and would otherwise give every action another token.

    Args:
        config: From ``load_policy_config``.
        path: A policy directory or a hub id.
        device: Where the preprocessor puts the batch.

    Returns:
        The preprocessor and the postprocessor.

    Raises:
        UserError: If a file is missing or cannot be read.
    """
    directory = resolve_policy_path(path)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: '{path}' has no saved processors")
    try:
        steps = json.loads((directory / PREPROCESSOR).read_text())["steps"]
        names = {step.get("registry_name") for step in steps}
        return make_pre_post_processors(
            config,
            pretrained_path=str(directory),
            preprocessor_overrides={k: v for k, v in _overrides(config, device).items() if k in names},
        )
    except Exception as error:
        raise UserError(f"cannot load the processors of '{path}': {_one_line(error)}") from error


def _overrides(config: PreTrainedConfig, device: str) -> dict[str, dict[str, Any]]:
    """Constructor arguments by step name that a saved preprocessor may have wrong."""
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
    """A SHA-256 over what decides the token ids of a policy, whatever folders its tokenizers lie in.

    Args:
        config: From ``load_policy_config``.
    """
    content: dict[str, Any] = {
        field: getattr(config, field, None)
        for field in ("fast_skip_tokens", "tokenizer_max_length", "max_action_tokens")
    }
    if hasattr(config, "action_tokenizer_name"):
        text = AutoTokenizer.from_pretrained(config.text_tokenizer_name)
        action = AutoProcessor.from_pretrained(config.action_tokenizer_name, trust_remote_code=True)
        content["text"] = _backend(text)
        content["action"] = _backend(action.bpe_tokenizer)
        content |= {
            f"action_{field}": getattr(action, field, None) for field in ("scale", "min_token", "max_token")
        }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _backend(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's own serialisation, without the padding and truncation that its last call left in it."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
