"""Differences between the policy of a run and the directory it started from.

Flags change fields of the policy's configuration, and some of these fields are also parameters of its
processors. What a run trains with must be what it saves: the changes are computed once, applied when the
processors are loaded, and written into every checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, ProcessorStep
from torch import Tensor

from craft_ds.errors import UserError, one_line
from craft_ds.policies.directory import ACTION_STEPS, POSTPROCESSOR, PREPROCESSOR, PolicyEdits

StepFields = dict[str, dict[str, Any]]

RENAME_STEP = "rename_observations_processor"
NORMALIZE_STEP = "normalizer_processor"
UNNORMALIZE_STEP = "unnormalizer_processor"
# Facts of a run or a machine, which do not describe the trained policy.
_NOT_SAVED = ("device", "pretrained_path", "pretrained_revision", "push_to_hub", "repo_id")
# No processor depends on these: most runs change them alone, and then need no comparison of processors.
_NOT_IN_PROCESSORS = (
    "optimizer_",
    "scheduler_",
    "gradient_checkpointing",
    "dtype",
    "temperature",
    *_NOT_SAVED,
)


@dataclasses.dataclass(frozen=True)
class PolicyChanges:
    """What a run changes in the policy that it starts from.

    Attributes:
        config: Changed fields of `config.json`, as JSON values.
        preprocessor: Changed constructor arguments of the preprocessor's steps, by step and name.
        postprocessor: The same of the postprocessor.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: StepFields = dataclasses.field(default_factory=dict)
    postprocessor: StepFields = dataclasses.field(default_factory=dict)


def changed_fields(config: PreTrainedConfig, source: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another of the same type, as JSON values."""
    before, now = (draccus.encode(one, PreTrainedConfig) for one in (source, config))
    return {
        name: value for name, value in now.items() if value != before.get(name) and name not in _NOT_SAVED
    }


def policy_changes(
    config: PreTrainedConfig,
    source: PreTrainedConfig,
    *,
    rename_map: Mapping[str, str] | None = None,
    statistics: Mapping[str, Mapping[str, Any]] | None = None,
) -> PolicyChanges:
    """Determine what a run changes in a policy and its processors.

    Args:
        config: The configuration of the run's policy, with its flags.
        source: The configuration in the directory that the run starts from.
        rename_map: Names of observations in the data set, with those in the policy; empty: the policy's own.
        statistics: Statistics that replace those of the policy; None: the policy's own.

    Raises:
        UserError: A flag would change the processors in a way that saved processors cannot follow.
    """
    fields = changed_fields(config, source)
    before: StepFields = {}
    after: StepFields = {}
    if names := [name for name in fields if not name.startswith(_NOT_IN_PROCESSORS)]:
        flags = ", ".join(f"--policy.{name}" for name in names)
        try:
            old, new = make_pre_post_processors(source), make_pre_post_processors(config)
        except Exception as error:  # factories and tokenizers raise errors of many types
            raise UserError(
                f"{flags}: the policy's processors cannot be made with it: {one_line(error)}"
            ) from error
        before, after = (_differences(*pair, flags) for pair in zip(old, new, strict=True))
    if rename_map:
        before.setdefault(RENAME_STEP, {})["rename_map"] = dict(rename_map)
    if statistics is not None:
        parameters = {
            "stats": {key: dict(entries) for key, entries in statistics.items()},
            "norm_map": config.normalization_mapping,
        }
        features = {**(config.input_features or {}), **(config.output_features or {})}
        before.setdefault(NORMALIZE_STEP, {}).update(parameters, features=features)
        after.setdefault(UNNORMALIZE_STEP, {}).update(parameters, features=config.output_features or {})
    return PolicyChanges(fields, before, after)


def step_name(step: ProcessorStep) -> str:
    """Return the name of a step in a saved processor."""
    return getattr(step, "_registry_name", None) or type(step).__name__


def policy_edits(
    changes: PolicyChanges, preprocessor: PolicyProcessorPipeline, postprocessor: PolicyProcessorPipeline
) -> PolicyEdits:
    """Return the changes in the form of a policy directory's files.

    Args:
        changes: The changes of a run.
        preprocessor: The run's preprocessor, loaded with the changes.
        postprocessor: The run's postprocessor, loaded with the changes.
    """
    steps: dict[str, StepFields] = {}
    states: dict[str, dict[str, dict[str, Tensor]]] = {}
    for file, pipeline, changed in (
        (PREPROCESSOR, preprocessor, changes.preprocessor),
        (POSTPROCESSOR, postprocessor, changes.postprocessor),
    ):
        for step in pipeline.steps:
            name = step_name(step)
            if name not in changed:
                continue
            # A step's own JSON form lacks fields that LeRobot forgets to save (see `_rename_tokenizers`).
            entries = {**changed[name], **step.get_config()}
            saved = {key: entries[key] for key in changed[name] if key != "stats"}
            steps.setdefault(file, {})[name] = json.loads(json.dumps(saved))
            if "stats" in changed[name]:
                state = {key: value.clone().contiguous() for key, value in step.state_dict().items()}
                states.setdefault(file, {})[name] = state
    return PolicyEdits(changes.config, steps, states)


def _differences(old: PolicyProcessorPipeline, new: PolicyProcessorPipeline, flags: str) -> StepFields:
    """Return the constructor arguments that differ between two pipelines of the same steps."""
    names = [[step_name(step) for step in pipeline.steps] for pipeline in (old, new)]
    if names[0] != names[1]:
        raise UserError(f"{flags} would change the steps of the policy's processors: omit it")
    changed: StepFields = {}
    for before, after in zip(old.steps, new.steps, strict=True):
        for field in dataclasses.fields(before) if dataclasses.is_dataclass(before) else ():
            was, value = getattr(before, field.name), getattr(after, field.name)
            if field.init and not isinstance(value, ProcessorStep) and not _equal(was, value):
                changed.setdefault(step_name(after), {})[field.name] = value
    return changed


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def match_saved_steps(changed: StepFields, saved: set[str], file: Path) -> StepFields:
    """Give changes the names of the steps in a saved processor.

    A policy's own action tokenizer step may have LeRobot's name or that of the embedded policy.

    Raises:
        UserError: A changed step is not in the saved processor.
    """
    matched: StepFields = {}
    for name, fields in changed.items():
        found = name
        if name in ACTION_STEPS and name not in saved:
            found = next((other for other in ACTION_STEPS if other in saved), name)
        if found not in saved:
            raise UserError(
                f"{file} has no step {name}, so {', '.join(fields)} cannot be changed in it: omit the flag, "
                "or use a policy whose processors have that step"
            )
        matched[found] = fields
    return matched
