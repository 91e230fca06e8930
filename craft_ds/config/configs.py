"""The flags that craft-ds adds to LeRobot's, as dataclasses. Imports neither torch nor LeRobot."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from craft_ds.distributed.env import launched_world_size
from craft_ds.errors import UserError
from craft_ds.worlds import WORLDS

ProjectionMode = Literal["weighted", "equal", "task_priority"]
EpsilonSchedule = Literal["linear", "cosine", "exponential"]
ConstraintSplit = Literal["heldout", "train"]
EngineName = Literal["auto", "single", "zero", "fsdp"]
EngineDtype = Literal["float32", "bfloat16"]
FsdpDtype = Literal["auto", "float32", "bfloat16"]
LoraInit = Literal["default", "gaussian"]
CheckpointLayout = Literal["consolidated", "per_rank"]
ActivationCheckpointing = Literal["none", "full"]
TrackerName = Literal["wandb", "tensorboard", "trackio"]


def check_choice(flag: str, value: str, choices: object) -> None:
    """Check a value that was set from Python or a file; the parser checks those of flags."""
    allowed = get_args(choices)
    if value not in allowed:
        raise UserError(f"{flag}={value}: choose one of {', '.join(allowed)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class CraftConfig:
    """Constrained Retention Fine-Tuning: the flags `--craft.*`."""

    enabled: bool = False
    """Run CRaFT; false is the plain baseline (same loop, no anchor is read)."""
    anchor_cache_dir: str = ""
    """Directory written by `craft-ds anchors`."""
    anchor_batch_size: int = 16
    """Anchors per rank for the retention gradient of one step."""
    retention_freq: int = 5
    """K: every K-th step is a retention step. Between them λ has no effect, so the mean retention weight
    is about λ/K."""
    initial_lambda: float = 1.0
    """λ before the first retention step."""
    lambda_lr: float = 0.01
    """Step size of the dual ascent, in λ per unit of loss."""
    lambda_max: float = 10.0
    """Upper bound of λ."""
    epsilon_start: float = 1.0
    """ε at step 0; see `epsilon_relative` for its unit."""
    epsilon_end: float = 0.1
    """ε after `epsilon_decay_steps`."""
    epsilon_decay_steps: int = 0
    """Optimizer steps over which ε falls; 0 means all training steps."""
    use_grad_projection: bool = True
    """Project g_t off g_r where they conflict."""
    conflict_threshold: float = -0.1
    """Cosine below which the two gradients conflict."""
    projection_mode: ProjectionMode = "weighted"
    """How g_t and g_r are merged: `weighted`, `equal` or `task_priority`."""
    epsilon_schedule: EpsilonSchedule = "linear"
    """How ε falls: `linear`, `cosine` or `exponential`."""
    epsilon_relative: bool = False
    """ε counts in multiples of the teacher's own loss on the anchors that measure the constraint, as the
    anchor cache records it: 1.1 allows a tenth more than the teacher has."""
    constraint_split: ConstraintSplit = "heldout"
    """Anchors that measure L_ret: `heldout` (episodes whose gradient is never followed; one more forward
    pass a retention step) or `train` (the anchors just drawn)."""
    vision_features: bool = False
    """Read what the teacher's vision tower made of the anchors' images from the cache, instead of running
    the tower on them. The cache must hold it (`--vision_features` of `craft-ds anchors`)
    for this policy's tower, and the tower must be frozen."""

    def validate(self) -> None:
        """Check every field that CRaFT would use.

        Raises:
            UserError: Names the flag, its value and what it must be.
        """
        if not self.enabled:
            return
        _require(
            bool(self.anchor_cache_dir),
            "--craft.enabled=true needs --craft.anchor_cache_dir (`craft-ds anchors` builds one)",
        )
        for name in ("anchor_batch_size", "retention_freq"):
            value = getattr(self, name)
            _require(value >= 1, f"--craft.{name}={value} must be at least 1")
        for name in ("initial_lambda", "lambda_lr", "lambda_max", "epsilon_end", "epsilon_decay_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"--craft.{name}={value} must not be negative")
        _require(
            self.initial_lambda <= self.lambda_max,
            f"--craft.initial_lambda={self.initial_lambda} exceeds --craft.lambda_max={self.lambda_max}",
        )
        _require(
            self.epsilon_start >= self.epsilon_end,
            f"--craft.epsilon_start={self.epsilon_start} is below --craft.epsilon_end={self.epsilon_end}: "
            "the constraint may only tighten, so set epsilon_start >= epsilon_end",
        )
        _require(
            -1.0 <= self.conflict_threshold <= 1.0,
            f"--craft.conflict_threshold={self.conflict_threshold} is a cosine and lies in [-1, 1]",
        )
        check_choice("--craft.projection_mode", self.projection_mode, ProjectionMode)
        check_choice("--craft.epsilon_schedule", self.epsilon_schedule, EpsilonSchedule)
        check_choice("--craft.constraint_split", self.constraint_split, ConstraintSplit)
        _require(
            self.epsilon_schedule != "exponential" or self.epsilon_end > 0,
            "--craft.epsilon_schedule=exponential needs --craft.epsilon_end above 0",
        )


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by PEFT: the flags `--lora.*`.

    A target layer with weight W computes (W + s·B·A)·x, with s = `alpha` / `rank`; A and B train, W and all
    else is frozen. `--lora=NAME` is `--lora.enabled=true --lora.preset=NAME`.
    """

    enabled: bool = False
    """Train adapters instead of the policy's own weights."""
    preset: str = "default"
    """Layers that get adapters. Of pi0_fast: `attention` of the language model, `attention_mlp` its
    feed-forward layers too, `attention_mlp_vision` the vision tower's as well; `default` is
    `attention_mlp`. Of other policies `default` is what LeRobot has for them."""
    target_modules: list[str] | str | None = None
    """Takes the preset's place, as PEFT knows it: a regular expression over module names, or a list of
    suffixes. Only linear layers can be targets."""
    rank: int = 8
    """Rows of A, columns of B."""
    alpha: int = 16
    """Scale of the adapters: s = `alpha` / `rank`."""
    dropout: float = 0.0
    """Probability with which an adapter's input is dropped in training."""
    use_rslora: bool = False
    """Scale by `alpha` / √`rank` instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train a magnitude for each output too (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    init: LoraInit = "default"
    """Initial value of A: `default` as PEFT (Kaiming uniform) or `gaussian`. B starts at zero."""
    full_modules: list[str] = field(default_factory=list)
    """Suffixes of modules that train fully, without adapters; PEFT's `modules_to_save`."""
    base_path: str = ""
    """Where the base policy of stored adapters is now, if it was moved since they were trained."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        if not self.enabled:
            _require(
                self == LoraConfig(),
                "--lora.* has no effect without adapters: add --lora.enabled=true, or leave it out",
            )
            return
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            _require(value >= 1, f"--lora.{name}={value} must be at least 1")
        _require(0.0 <= self.dropout < 1.0, f"--lora.dropout={self.dropout} must lie in [0, 1)")
        check_choice("--lora.init", self.init, LoraInit)


@dataclass
class CheckpointConfig:
    """How checkpoints are written: the flags `--checkpoint.*`."""

    layout: CheckpointLayout = "consolidated"
    """`consolidated`: all ranks write their ranges of one `model.safetensors`. `per_rank`: each writes
    files of its own, for object stores and network file systems on which ranks cannot write to the same
    file; `craft-ds export` joins them."""
    background: bool = False
    """Write while training continues, from a copy in host memory (12 bytes a parameter / world size in full
    training) instead of while training waits."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        check_choice("--checkpoint.layout", self.layout, CheckpointLayout)


@dataclass
class FsdpConfig:
    """PyTorch FSDP2: the flags `--engine.fsdp.*`, in PyTorch's own words."""

    dp_shard: int = -1
    """Ranks that share one copy of the model; -1: all, divided by `dp_replicate`."""
    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding, HSDP); 1: none."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward; false gathers them once a pass and holds the
    whole model meanwhile."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory. On an accelerator this needs a policy
    that moves its inputs by hand to the right device: LeRobot's go where their first parameter lies,
    which is the accelerator only if that parameter belongs to no shard unit, as in pi0_fast."""
    param_dtype: FsdpDtype = "auto"
    """Dtype of gathered parameters; `auto`: that of `--engine.dtype`."""
    reduce_dtype: FsdpDtype = "float32"
    """Dtype in which gradients are reduced over ranks; they are kept in fp32. `auto`: as `param_dtype`."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        _require(
            self.dp_shard == -1 or self.dp_shard >= 1,
            f"--engine.fsdp.dp_shard={self.dp_shard} must be at least 1, or -1 for all ranks",
        )
        _require(self.dp_replicate >= 1, f"--engine.fsdp.dp_replicate={self.dp_replicate} must be at least 1")
        check_choice("--engine.fsdp.param_dtype", self.param_dtype, FsdpDtype)
        check_choice("--engine.fsdp.reduce_dtype", self.reduce_dtype, FsdpDtype)


@dataclass
class EngineConfig:
    """How the model is sharded: the flags `--engine.*` (`--engine=NAME` is `--engine.name=NAME`)."""

    name: EngineName = "auto"
    """`single` (one process), `zero` (DeepSpeed ZeRO), `fsdp` (PyTorch FSDP2) or `auto`: `zero` where a
    DeepSpeed config is given, else `fsdp` where several processes were launched, else `single`."""
    ds_config: str | None = None
    """DeepSpeed configuration file; `--ds_config FILE` is the same flag."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """Options of FSDP2."""
    dtype: EngineDtype = "float32"
    """Dtype of forward and backward. `bfloat16` keeps fp32 master weights and moments."""

    def validate(self) -> None:
        """Resolve `auto` and check the combination.

        Raises:
            UserError: Names the flag and what to do.
        """
        check_choice("--engine", self.name, EngineName)
        check_choice("--engine.dtype", self.dtype, EngineDtype)
        if self.name == "auto":
            self.name = "zero" if self.ds_config else "fsdp" if launched_world_size() > 1 else "single"
        _require(
            self.name != "zero" or bool(self.ds_config),
            "--engine=zero needs --ds_config, for example --ds_config zero3",
        )
        _require(
            self.name == "zero" or not self.ds_config,
            f"--ds_config={self.ds_config} has no meaning with --engine={self.name}: leave one of them out",
        )
        self.fsdp.validate()
        _require(
            self.name == "fsdp" or self.fsdp == FsdpConfig(),
            f"--engine.fsdp.* has no meaning with --engine={self.name}: leave it out, or set --engine=fsdp",
        )


@dataclass
class WorldEvalConfig:
    """The embedded world in which the policy is tried, every `eval_freq` steps: the flags `--world.*`."""

    name: str = ""
    """`metaworld` or `blocks`; empty: none."""
    tasks: list[str] = field(default_factory=list)
    """The world's tasks to run; empty: all, old and new."""
    episodes: int = 10
    """Episodes a task, over all ranks."""
    seed: int = 1000
    """Seed of the scenes, which are the same at every evaluation; `craft-ds eval` has the same
    default."""

    def validate(self, eval_freq: int) -> None:
        """Check what needs no world.

        Args:
            eval_freq: Steps between evaluations; 0: there is none.

        Raises:
            UserError: Names the flag and what to do.
        """
        if not self.name:
            if self.tasks:
                raise UserError(f"--world.tasks needs --world.name: choose one of {', '.join(WORLDS)}")
            return
        if self.name not in WORLDS:
            raise UserError(f"--world.name={self.name} is unknown: choose one of {', '.join(WORLDS)}")
        if self.episodes < 1:
            raise UserError(f"--world.episodes={self.episodes} must be at least 1")
        if self.seed < 0:
            raise UserError(f"--world.seed={self.seed} must not be negative")
        if eval_freq <= 0:
            raise UserError(f"--world.name={self.name} is tried every --eval_freq steps: set --eval_freq too")


@dataclass
class RunOptions:
    """The flags that craft-ds adds to those of `lerobot-train`."""

    craft: CraftConfig = field(default_factory=CraftConfig)
    """The retention constraint, `--craft.*`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the model is sharded, `--engine.*`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train instead of the policy's own weights, `--lora.*`. LeRobot's `--peft.*` means the
    same in its own words."""
    world: WorldEvalConfig = field(default_factory=WorldEvalConfig)
    """An embedded world in which the policy is tried every `eval_freq` steps, `--world.*`."""
    eval_freq: int = 0
    """Report held-out task loss and anchor loss every so many steps; 0 turns it off. Needs
    `--dataset.eval_split`, of which 0.05 is taken where none is given. (`--eval_steps` is LeRobot's
    name for the same.)"""
    eval_steps: int = 0
    """LeRobot's name for `--eval_freq`."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of `batch_size` a rank and step."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full` keeps only the inputs of decoder and encoder layers and runs them again in the backward pass:
    less memory, about a third more computing. `none` keeps everything. LeRobot's
    `--policy.gradient_checkpointing=true` means `full`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written, `--checkpoint.*`."""
    save_total_limit: int = 0
    """How many of the newest periodic checkpoints stay; 0: all. An older one is deleted once a newer one
    is whole and verified. `final` always stays."""
    keep_period: int = 0
    """Periodic checkpoints whose step is a multiple of this stay in any case; 0: none does."""
    log_to: str = ""
    """Trackers beside `metrics.jsonl`, separated by commas: wandb, tensorboard, trackio.
    `--wandb.enable=true` means wandb; `--wandb.project` names the project of trackio too."""
    max_runtime: str = ""
    """Time after which the run finishes its step, saves and ends with status 75: seconds, or with a unit,
    as 30m, 3.5h, 2d. Empty: none. Leave room for a step and a save."""
    rank_timeout: float = 600.0
    """Seconds without progress after which a run ends and names the rank that it waited for."""
    max_skipped_steps: int = 10
    """Steps with a non-finite loss or gradient that may follow one another; they change nothing, and one
    more ends the run."""
