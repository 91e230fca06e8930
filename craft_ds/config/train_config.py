"""The configuration of a run: LeRobot's `TrainPipelineConfig` and what craft-ds adds to it."""

import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args, get_type_hints

import draccus
import yaml
from lerobot.configs import PreTrainedConfig, parser
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.config.checks import check_choice, require
from craft_ds.config.configs import (
    ActivationCheckpointing,
    DataCheck,
    LoraConfig,
    Normalization,
    OnBadSample,
    RunOptions,
    TrackerName,
)
from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.datasets import resolve_datasets
from craft_ds.config.presets import expand_preset_in
from craft_ds.config.secret_scan import refuse_secrets
from craft_ds.config.selection_rules import check_selection
from craft_ds.config.suggestions import RENAMED_FLAGS
from craft_ds.config.unsupported import NO_EFFECT_IN_PI0_FAST, refuse_unsupported
from craft_ds.distributed.preemption import parse_duration
from craft_ds.errors import UserError, one_line
from craft_ds.policies.changes import changed_fields
from craft_ds.policies.loading import check_action_steps, load_policy_config, resolve_policy_path
from craft_ds.policies.tiny_pi0_fast.tokenizers import reroot_tokenizers
from craft_ds.tensor_io.move_aside import directory_contents


@dataclass
class TaskDatasetConfig(DatasetConfig):
    """LeRobot's `--dataset.*`; with `--datasets`, `repo_id` joins the names of the mixture."""

    repo_id: str = ""


@dataclass
class TrainConfig(RunOptions, TrainPipelineConfig):
    """The flags of `lerobot-train`, with their meaning unchanged, and those of craft-ds."""

    dataset: TaskDatasetConfig = field(default_factory=TaskDatasetConfig)
    # The checkpoint to resume, after all its bytes were verified.
    verified_checkpoint: Path | None = field(init=False, default=None)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read a configuration file, or that of a checkpoint.

        Fields renamed since may have their old names, and `craft.preset` stands for the preset's flags.

        Args:
            pretrained_name_or_path: The file, or its directory.
            **kwargs: See LeRobot's `TrainPipelineConfig.from_pretrained`.
        """
        path = Path(pretrained_name_or_path)
        path = path / TRAIN_CONFIG_NAME if path.is_dir() else path
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if not (_rename_fields(content) | expand_preset_in(content)):
            return super().from_pretrained(pretrained_name_or_path, **kwargs)
        with tempfile.TemporaryDirectory() as directory:
            changed = Path(directory) / "changed.yaml"
            changed.write_text(yaml.safe_dump(content), encoding="utf-8")
            return super().from_pretrained(changed, **kwargs)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `--config_path` reads."""
        plain = json.loads(json.dumps(self.to_dict()))  # enumerations become text
        return yaml.safe_dump(plain, sort_keys=False)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers that `--log_to` and `--wandb.enable` select, each once."""
        asked = [name.strip() for name in self.log_to.split(",") if name.strip()]
        return tuple(dict.fromkeys(["wandb", *asked] if self.wandb.enable else asked))

    @property
    def one_gradient(self) -> bool:
        """True if both losses of a retention step accumulate in one gradient."""
        return self.craft.enabled and self.craft.adds_losses and self.penalty.name == "none"

    def validate(self) -> None:
        """Resolve defaults, and check the configuration as far as possible without building anything.

        Raises:
            UserError: One line that names the flag or file and the fix.
        """
        _refuse_nulls(self)
        self.craft.validate()
        self.penalty.validate(self.craft)
        threshold = self.craft.conflict_threshold
        require(
            not self.one_gradient or threshold == CraftConfig().conflict_threshold,
            f"--craft.conflict_threshold={threshold} has no effect with --craft.use_grad_projection=false, "
            "which measures no conflict: omit one of them",
        )
        buffer = self.craft.gradient_buffer
        require(
            not self.one_gradient or buffer == "device",
            f"--craft.gradient_buffer={buffer} has no effect with --craft.use_grad_projection=false: both "
            "losses accumulate in one gradient; omit one of them",
        )
        require(0.0 <= self.ema_decay < 1.0, f"--ema_decay={self.ema_decay} must lie in [0, 1)")
        self.engine.resolve()
        if self.peft is not None:
            asked = from_lerobot(self.peft)
            if self.lora not in (LoraConfig(), asked):  # a saved configuration contains both
                raise UserError("--lora.* and --peft.* both describe adapters: use one of them")
            self.lora = asked
        self.lora.validate()
        resolve_datasets(self.dataset, self.datasets, resume=self.resume)
        self.checkpoint.validate()
        self.profile.validate(self.steps)
        check_choice("--data_check", self.data_check, DataCheck)
        self.data_report.validate()
        for tracker in self.trackers:
            check_choice("--log_to", tracker, TrackerName)
        parse_duration("--max_runtime", self.max_runtime)
        least = {
            "steps": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_workers": 0,
            "save_total_limit": 0,
            "keep_period": 0,
            "early_stop_patience": 0,
            "max_skipped_steps": 0,
            "outlier_factor": 0,
            "rank_timeout": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"--{name}={getattr(self, name)} must be at least {minimum}")
        if not math.isfinite(self.rank_timeout):
            raise UserError(f"--rank_timeout={self.rank_timeout}: must be a number of seconds")
        check_choice("--activation_checkpointing", self.activation_checkpointing, ActivationCheckpointing)
        check_choice("--normalization", self.normalization, Normalization)
        check_choice("--on_bad_sample", self.on_bad_sample, OnBadSample)
        self._refuse_unsupported()
        if not self.resume:
            self.check_output_dir()
        if self.eval_freq and self.eval_steps and self.eval_freq != self.eval_steps:
            raise UserError(
                f"--eval_freq={self.eval_freq} and --eval_steps={self.eval_steps} are the same flag: set one"
            )
        self.eval_freq = self.eval_freq or self.eval_steps
        self.world.validate(self.eval_freq)
        self.eval_steps = self.eval_freq
        if self.eval_freq and not self.dataset.eval_split:
            self.dataset.eval_split = 0.05
        check_selection(self)
        try:
            with nullcontext() if self.resume else _output_dir_as_text(self):
                super().validate()
        except (ValueError, OSError) as error:
            raise UserError(one_line(error, limit=None)) from error
        self._check_rates()
        refuse_secrets(self.to_dict())

    def check_output_dir(self) -> None:
        """Check that the output directory is none or a directory, and empty for a new run.

        Raises:
            UserError: It is something else.
        """
        if not self.output_dir:
            return
        output_dir = Path(self.output_dir)
        if os.path.lexists(output_dir) and not output_dir.is_dir():
            raise UserError(
                f"--output_dir={output_dir} exists already and is not a directory: move it away, or choose "
                "another"
            )
        try:
            contents = [] if self.resume else directory_contents(output_dir)
        except OSError as error:
            raise UserError(f"--output_dir={output_dir} cannot be read: {error}") from error
        if contents:
            raise UserError(
                f"--output_dir={output_dir} exists already: choose another, or resume that run with "
                f"--resume=true --config_path={output_dir}/last/{TRAIN_CONFIG_NAME}"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write `train_config.json`, with absolute paths: a run may be resumed from another directory."""
        saved = copy.deepcopy(self)
        for owner, name in (
            *((source, "root") for source in saved.datasets),
            (saved, "output_dir"),
            (saved.dataset, "root"),
            (saved.engine, "ds_config"),
            (saved.lora, "base_path"),
            (saved.policy, "pretrained_path"),
        ):
            value = getattr(owner, name)
            if value and (name == "output_dir" or Path(value).exists()):
                setattr(owner, name, type(value)(Path(value).absolute()))
        caches = [Path(path) for path in saved.craft.anchor_caches]
        saved.craft.anchor_cache_dir = ",".join(
            str(path.absolute() if path.exists() else path) for path in caches
        )
        super(TrainConfig, saved)._save_pretrained(save_directory)

    def _check_rates(self) -> None:
        """Check the numbers that LeRobot's optimizers and schedules divide by, or need to be positive."""
        if self.use_policy_training_preset:
            flags = ["policy.optimizer_lr", "policy.scheduler_decay_steps"]
        else:
            flags = ["optimizer.lr", "scheduler.peak_lr", "scheduler.num_decay_steps"]
        for flag in flags:
            group, name = flag.split(".")
            value = getattr(getattr(self, group), name, None)
            if value is not None and value <= 0:
                raise UserError(f"--{flag}={value} must be greater than 0")

    def _refuse_unsupported(self) -> None:
        given = {argument.partition("=")[0].removeprefix("--") for argument in sys.argv[1:]}
        defaults = flat(TrainConfig(dataset=DatasetConfig(repo_id="")).to_dict())
        plain = {
            name: value for name, value in flat(self.to_dict()).items() if not name.startswith("policy.")
        }
        refuse_unsupported(plain, defaults, given, from_file=not self.resume)
        read_by_penalty = {"craft.anchor_cache_dir"} if self.penalty.name == "ewc" else set()
        craft = sorted(name for name in given - read_by_penalty if name.startswith("craft."))
        if craft and not self.craft.enabled and "craft.enabled" not in given and not self.resume:
            raise UserError(
                f"--{craft[0]} has no effect without --craft.enabled=true: add it, or set "
                "--craft.enabled=false for the baseline"
            )
        if not self.dataset.use_imagenet_stats and self.normalization == "policy":
            raise UserError(
                "--dataset.use_imagenet_stats=false has no effect with the policy's statistics: omit it, or "
                "set --normalization=dataset"
            )

    def _resolve_pretrained_from_cli(self) -> None:
        """Load the configuration of `--policy.path`, or find the checkpoint to resume."""
        path = parser.get_path_arg("policy")
        if self.resume:
            if path:
                raise UserError(
                    f"--policy.path={path} has no meaning with --resume=true, which resumes from the "
                    "checkpoint of --config_path: omit one of them"
                )
            self._resolve_resume_checkpoint()
        elif path:
            overrides = parser.get_yaml_overrides("policy") + (parser.get_cli_overrides("policy") or [])
            revision = dict(flag.partition("=")[::2] for flag in overrides).get("--pretrained_revision")
            self.policy = load_policy_config(resolve_policy_path(path, revision), overrides)
            self.policy.pretrained_path = Path(path)
            asked = parser.get_type_arg("policy")
            if asked and asked != self.policy.type:
                raise UserError(f"--policy.type={asked}, but {path} is of type {self.policy.type}: omit it")
        if self.policy is None or not self.policy.pretrained_path:
            raise UserError("--policy.path is missing: craft-ds fine-tunes a trained policy")
        # A configuration that was saved or made in Python may contain former paths of its tokenizers.
        reroot_tokenizers(self.policy, self.policy.pretrained_path)
        self._resolve_policy(self.policy)

    def _resolve_policy(self, policy: PreTrainedConfig) -> None:
        _refuse_nulls(policy, "policy.")
        check_action_steps(policy)
        self._refuse_policy_flags(policy)
        if getattr(policy, "gradient_checkpointing", False):
            self.activation_checkpointing = "full"
        # LeRobot's default is to push, which requires a repo_id.
        policy.push_to_hub = False
        if self.use_policy_training_preset and not self.resume:
            presets = (policy.get_optimizer_preset(), policy.get_scheduler_preset())
            for name, given, preset in zip(
                ("optimizer", "scheduler"), (self.optimizer, self.scheduler), presets, strict=True
            ):
                if given not in (None, preset):
                    raise UserError(
                        f"--{name}.* has no effect with the policy's preset: set --policy.{name}_*, or "
                        "give both --optimizer.* and --scheduler.* with --use_policy_training_preset=false"
                    )

    def _refuse_policy_flags(self, policy: PreTrainedConfig) -> None:
        """Check that every flag of the policy has an effect, in training and in the saved policy."""
        given = {argument.partition("=")[0].removeprefix("--") for argument in sys.argv[1:]}
        given |= {f"policy.{flag.partition('=')[0][2:]}" for flag in parser.get_yaml_overrides("policy")}
        source = load_policy_config(resolve_policy_path(policy.pretrained_path, policy.pretrained_revision))
        own = flat({"policy": draccus.encode(source, PreTrainedConfig)})
        values = flat({"policy": draccus.encode(policy, PreTrainedConfig)})
        # LeRobot's default is to push: only a flag shows that the user wants to.
        if "policy.push_to_hub" not in given:
            del values["policy.push_to_hub"]
        refuse_unsupported(values, own, given, from_file=not self.resume)
        changed = changed_fields(policy, source)
        if isinstance(policy, PI0FastConfig):
            for name in NO_EFFECT_IN_PI0_FAST:
                if name in changed:
                    raise UserError(f"--policy.{name} has no effect in {policy.type}: omit it")
        dtype = getattr(policy, "dtype", None)
        if ("policy.dtype" in given or "dtype" in changed) and dtype != self.engine.dtype and not self.resume:
            raise UserError(
                f"--policy.dtype={dtype}, but --engine.dtype={self.engine.dtype} is what trains: set "
                f"--engine.dtype={dtype}, or omit --policy.dtype"
            )

    def _resolve_resume_checkpoint(self) -> None:
        """The checkpoint is the directory of `--config_path`, whatever the saved config named."""
        config_path = parser.parse_arg("config_path")
        if not config_path:
            raise UserError(
                f"--resume=true needs --config_path=<run>/step_NNNNNN/{TRAIN_CONFIG_NAME}, or <run>/last/…"
            )
        path = Path(config_path).resolve()
        self.checkpoint_path = path if path.is_dir() else path.parent
        if self.policy is not None:
            self.policy.pretrained_path = self.checkpoint_path
        if not parser.parse_arg("output_dir"):  # the saved one may be relative to another directory
            self.output_dir = self.checkpoint_path.parent


def _refuse_nulls(config: Any, above: str = "") -> None:
    """Check that no required value is null: the parser accepts null for a value of any type."""
    try:
        types = get_type_hints(type(config))
    except NameError:  # annotations of an external policy may name types that only a type checker imports
        return
    for entry in fields(config):
        value, flag = getattr(config, entry.name, None), f"{above}{entry.name}"
        if value is None and types[entry.name] is not Any and NoneType not in get_args(types[entry.name]):
            raise UserError(f"--{flag}=null: give it a value, or omit it")
        if is_dataclass(value):
            _refuse_nulls(value, f"{flag}.")


@contextmanager
def _output_dir_as_text(config: Any) -> Iterator[None]:
    """Keep LeRobot from refusing an empty output directory: it refuses any that exists and is a `Path`."""
    output_dir = config.output_dir
    if output_dir:
        config.output_dir = str(output_dir)
    try:
        yield
    finally:
        config.output_dir = output_dir or config.output_dir


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level, with names joined by dots."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        nested = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return values


def _rename_fields(content: Any) -> bool:
    """Give the fields of a configuration file their present names; return True if there were others."""
    found = False
    for old, new in RENAMED_FLAGS.items():
        *groups, name = old.removeprefix("--").split(".")
        section = content
        for group in groups:
            section = section.get(group) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            section[new.rsplit(".", 1)[-1]] = section.pop(name)
            found = True
    return found


def from_lerobot(config: PeftConfig) -> LoraConfig:
    """Return the same adapters as `--lora.*`.

    Args:
        config: LeRobot's `--peft.*`.

    Raises:
        UserError: Another method than LoRA, or an initialisation that needs full weights.
    """
    if config.method_type.upper() != "LORA":
        raise UserError(f"--peft.method_type={config.method_type} is not supported by craft-ds: use LORA")
    if config.init_type not in (None, "gaussian"):
        raise UserError(
            f"--peft.init_type={config.init_type} decomposes full weights, which no rank holds: omit it, "
            "or set gaussian"
        )
    return LoraConfig(
        enabled=True,
        target_modules=config.target_modules,
        rank=config.r,
        alpha=8 if config.lora_alpha is None else config.lora_alpha,  # PEFT's own default
        init=config.init_type or "default",
        modules_to_save=config.full_training_modules or [],
    )
