"""Policy directories in LeRobot's layout, including the tokenizers of an embedded policy.

`config.json`, `model.safetensors`, `policy_preprocessor.json` and `policy_postprocessor.json` with
their `.safetensors` state, and for an embedded policy `text_tokenizer/` and `action_tokenizer/`.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from safetensors.torch import save_file
from torch import Tensor

from craft_ds.errors import UserError
from craft_ds.policies.tiny_pi0_fast.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER
from craft_ds.tensor_io.safe_json import path_inside, read_object
from craft_ds.tensor_io.tensor_file import TensorFile

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"

ACTION_STEPS = ("action_tokenizer_processor", "craft_action_tokenizer_processor")
_FOLDER_OF_FIELD = {
    "text_tokenizer_name": TEXT_TOKENIZER,
    "tokenizer_name": TEXT_TOKENIZER,
    "paligemma_tokenizer_name": TEXT_TOKENIZER,
    "action_tokenizer_name": ACTION_TOKENIZER,
}


@dataclasses.dataclass(frozen=True)
class PolicyEdits:
    """Values that a copy of a policy directory has in place of those in the original.

    Attributes:
        config: Fields of `config.json`, as JSON values.
        steps: Fields of processor steps as JSON values, by file and step.
        states: Tensors that replace the state of a step, by file and step.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    states: dict[str, dict[str, dict[str, Tensor]]] = dataclasses.field(default_factory=dict)


NO_EDITS = PolicyEdits()


def save_policy_directory(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    directory: str | Path,
) -> None:
    """Write a policy with its processors and tokenizers; stored tokenizer names are relative to it.

    Args:
        policy: The policy.
        preprocessor: Turns raw batches into policy batches.
        postprocessor: Turns policy actions into actions.
        directory: Output folder; may exist.
    """
    directory = Path(directory)
    policy.save_pretrained(directory)
    preprocessor.save_pretrained(directory)
    postprocessor.save_pretrained(directory)
    for field, folder in (
        ("text_tokenizer_name", TEXT_TOKENIZER),
        ("action_tokenizer_name", ACTION_TOKENIZER),
    ):
        source = Path(getattr(policy.config, field))
        if source.is_dir() and source.resolve() != (directory / folder).resolve():
            _copy_folder(source, directory / folder)
    _rename_tokenizers(directory, root=None)


def copy_policy_files(
    source_dir: str | Path, target_dir: str | Path, final_dir: str | Path, edits: PolicyEdits = NO_EDITS
) -> None:
    """Copy a policy directory without its weights, so that stock LeRobot loads the copy.

    Args:
        source_dir: A policy directory.
        target_dir: Output folder, created if missing. May be a temporary name of `final_dir`.
        final_dir: Final path of the directory: stored tokenizer names become absolute paths in it.
        edits: Values that differ in the copy.

    Raises:
        UserError: A file of the directory is damaged, or names a file outside of it.
        OSError: A file cannot be read or written.
    """
    source, target = Path(source_dir), Path(target_dir)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / CONFIG, read_config(source) | edits.config, indent=4)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if (source / name).is_file():
            _copy_pipeline(source / name, target / name, edits)
    for folder in (TEXT_TOKENIZER, ACTION_TOKENIZER):
        if (source / folder).is_dir():
            _copy_folder(source / folder, target / folder)
    _rename_tokenizers(target, root=Path(final_dir).resolve())


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a tokenizer's folder: regular files inside the policy's directory only.

    A snapshot of the hub's cache consists of links into the same repository's `blobs`.

    Raises:
        UserError: A file is a link to somewhere else, or not a regular file.
    """
    policy = source.parent.resolve()
    allowed = policy.parents[1] if policy.parent.name == "snapshots" else policy
    for path in (source, *source.rglob("*")):
        if path.is_symlink() and not (path.resolve().is_relative_to(allowed) and path.resolve().is_file()):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the policy: replace it by the file"
            )
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} is not a regular file: remove it")
    shutil.copytree(source, target, dirs_exist_ok=True)


def _copy_pipeline(source: Path, target: Path, edits: PolicyEdits) -> None:
    pipeline = read_pipeline(source)
    for index, step in enumerate(pipeline["steps"]):
        name = str(step.get("registry_name", str(step.get("class")).rpartition(".")[2]))
        if changed := edits.steps.get(source.name, {}).get(name):
            step["config"] = step.get("config", {}) | changed
        state = edits.states.get(source.name, {}).get(name)
        if state is not None:
            # The name that LeRobot gives it.
            step.setdefault("state_file", f"{source.stem}_step_{index}_{name}.safetensors")
            save_file(state, target.parent / step["state_file"])
        elif "state_file" in step:
            shutil.copyfile(source.parent / step["state_file"], target.parent / step["state_file"])
    _write(target, pipeline, indent=2)


def _write(file: Path, content: dict[str, Any], indent: int) -> None:
    file.write_text(json.dumps(content, indent=indent) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a policy directory.

    Raises:
        UserError: It is missing or damaged.
    """
    return _read(directory / CONFIG)


def read_pipeline(file: Path) -> dict[str, Any]:
    """Read a saved processor and check the files that its steps name.

    Args:
        file: `policy_preprocessor.json` or `policy_postprocessor.json` of a policy directory.

    Raises:
        UserError: It is missing or damaged, or the state of a step is not a safetensors file beside it.
    """
    pipeline = _read(file)
    steps = pipeline.get("steps")
    if not isinstance(steps, list) or not all(map(_is_step, steps)):
        raise UserError(f"{file} is damaged: it does not describe the steps of a processor")
    for step in steps:
        if "state_file" in step:
            _check_state(file, step["state_file"])
    return pipeline


def _is_step(step: Any) -> bool:
    return isinstance(step, dict) and isinstance(step.get("config", {}), dict)


def _check_state(file: Path, name: object) -> None:
    try:
        path = path_inside(file.parent, name)
        # LeRobot writes no others; a file elsewhere or of another kind could overwrite another file.
        if path.parent != file.parent or path.suffix != ".safetensors" or path.name == WEIGHTS:
            raise ValueError(f"{name!r} is not the state of a step")
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        with TensorFile(path):  # LeRobot's reader has no limits of its own
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: a step's state_file: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from error


def _rename_tokenizers(directory: Path, root: Path | None) -> None:
    """Set the stored names to the directory's own tokenizer folders: relative, or paths under `root`.

    LeRobot's action tokenizer step does not save two of its fields; they are restored from config.json, since
    without them a reload would map every action to another token.
    """

    def rename(fields: dict[str, Any]) -> None:
        for field, folder in _FOLDER_OF_FIELD.items():
            if field in fields and (directory / folder).is_dir():
                fields[field] = str(root / folder) if root else folder

    config = read_config(directory)
    rename(config)
    _write(directory / CONFIG, config, indent=4)
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (directory / name).is_file():
            continue
        pipeline = read_pipeline(directory / name)
        for step in pipeline["steps"]:
            fields = step.setdefault("config", {})
            if step.get("registry_name") in ACTION_STEPS and "text_tokenizer_name" in config:
                fields.setdefault("paligemma_tokenizer_name", config["text_tokenizer_name"])
                if "fast_skip_tokens" not in config:
                    raise UserError(f"{directory / CONFIG} is damaged: it has no fast_skip_tokens")
                fields.setdefault("fast_skip_tokens", config["fast_skip_tokens"])
            rename(fields)
        _write(directory / name, pipeline, indent=2)
