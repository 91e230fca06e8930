"""The flags that craft-ds adds to LeRobot's, as dataclasses. Imports neither torch nor LeRobot."""

from dataclasses import dataclass, field
from typing import Literal

from craft_ds.config.checks import check_choice, require
from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.data_report import DataReportConfig
from craft_ds.config.datasets import DatasetSource
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.distributed.env import RANK_TIMEOUT_S, launched_world_size
from craft_ds.errors import UserError
from craft_ds.worlds import WORLDS

EngineName = Literal["auto", "single", "zero", "fsdp"]
EngineDtype = Literal["float32", "bfloat16"]
OptimizerState = Literal["fp32", "bf16", "int8"]
FsdpDtype = Literal["auto", "float32", "bfloat16"]
LoraInit = Literal["default", "gaussian"]
CheckpointLayout = Literal["consolidated", "per_rank"]
ActivationCheckpointing = Literal["none", "full"]
Normalization = Literal["policy", "dataset"]
OnBadSample = Literal["error", "skip"]
TrackerName = Literal["wandb", "tensorboard", "trackio"]
DataCheck = Literal["error", "warn", "off"]


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by PEFT: the flags `--lora.*`.

    A target layer with weight W computes (W + s·B·A)·x, with s = `alpha` / `rank`; A and B are trained, W and
    all other parameters are frozen. `--lora=NAME` is `--lora.enabled=true --lora.preset=NAME`.
    """

    enabled: bool = False
    """Train adapters instead of the policy's own weights."""
    preset: str = "default"
    """Layers that get adapters. For pi0_fast: `attention` (of the language model), `attention_mlp` (its
    feed-forward layers too), `attention_mlp_vision` (those of the vision tower as well); `default` is
    `attention_mlp`. For other policies `default` means LeRobot's targets."""
    target_modules: list[str] | str | None = None
    """Replaces the preset, in PEFT's form: a regular expression over module names, or a list of suffixes.
    Only linear layers can be targets."""
    rank: int = 8
    """Rows of A, columns of B."""
    alpha: int = 16
    """Scale of the adapters: s = `alpha` / `rank`."""
    dropout: float = 0.0
    """Dropout probability of an adapter's input in training."""
    use_rslora: bool = False
    """Scale by `alpha` / √`rank` instead (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Also train a magnitude per output (DoRA, Liu et al. 2024, arXiv:2402.09353)."""
    init: LoraInit = "default"
    """Initial value of A: `default` as PEFT (Kaiming uniform) or `gaussian`. B starts at zero."""
    modules_to_save: list[str] = field(default_factory=list)
    """Suffixes of modules that are trained fully, without adapters."""
    base_path: str = ""
    """Present directory of the base policy, if it was moved after the adapters were trained."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        if not self.enabled:
            require(
                self == LoraConfig(),
                "--lora.* has no effect without adapters: add --lora.enabled=true, or omit it",
            )
            return
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            require(value >= 1, f"--lora.{name}={value} must be at least 1")
        require(0.0 <= self.dropout < 1.0, f"--lora.dropout={self.dropout} must lie in [0, 1)")
        check_choice("--lora.init", self.init, LoraInit)


@dataclass
class CheckpointConfig:
    """Format of checkpoints: the flags `--checkpoint.*`."""

    layout: CheckpointLayout = "consolidated"
    """`consolidated`: all ranks write their ranges of one `model.safetensors`. `per_rank`: each rank writes
    its own files, for object stores and network file systems on which ranks cannot write to the same file;
    `craft-ds export` joins them."""
    background: bool = False
    """Write from a copy in host memory while training continues. The copy takes 12 bytes per parameter
    divided by the world size in full training."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        check_choice("--checkpoint.layout", self.layout, CheckpointLayout)


@dataclass
class FsdpConfig:
    """PyTorch FSDP2: the flags `--engine.fsdp.*`, named as in PyTorch."""

    dp_shard: int = -1
    """Ranks that share one copy of the model; -1: all, divided by `dp_replicate`."""
    dp_replicate: int = 1
    """Copies of the sharded model (hybrid sharding, HSDP); 1: none."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward; false gathers them once per step and keeps the
    full model in memory until the backward pass has used it."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory. On an accelerator the policy must move
    its inputs to the right device itself: LeRobot's policies use the device of their first parameter, which
    is the accelerator only if that parameter belongs to no shard unit, as in pi0_fast."""
    param_dtype: FsdpDtype = "auto"
    """Dtype of gathered parameters; `auto`: that of `--engine.dtype`."""
    reduce_dtype: FsdpDtype = "float32"
    """Dtype in which gradients are reduced over ranks; they are stored in fp32. `auto`: as `param_dtype`."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        require(
            self.dp_shard == -1 or self.dp_shard >= 1,
            f"--engine.fsdp.dp_shard={self.dp_shard} must be at least 1, or -1 for all ranks",
        )
        require(self.dp_replicate >= 1, f"--engine.fsdp.dp_replicate={self.dp_replicate} must be at least 1")
        check_choice("--engine.fsdp.param_dtype", self.param_dtype, FsdpDtype)
        check_choice("--engine.fsdp.reduce_dtype", self.reduce_dtype, FsdpDtype)


@dataclass
class EngineConfig:
    """Sharding of the model: the flags `--engine.*` (`--engine=NAME` is `--engine.name=NAME`)."""

    name: EngineName = "auto"
    """`single` (one process), `zero` (DeepSpeed ZeRO), `fsdp` (PyTorch FSDP2) or `auto`: `zero` if a
    DeepSpeed config is given, else `fsdp` if several processes were launched, else `single`."""
    ds_config: str | None = None
    """DeepSpeed configuration file, or the name of a shipped one such as `zero3`; `--ds_config FILE` is the
    same flag."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """Options of FSDP2."""
    dtype: EngineDtype = "float32"
    """Dtype of forward and backward. `bfloat16` keeps fp32 master weights and moments."""
    optimizer_state: OptimizerState = "fp32"
    """Format of the moments of Adam and AdamW: `fp32` (8 bytes per trained parameter), `bf16` (4) or `int8`
    (2.03; Dettmers et al. 2022, arXiv:2110.02861), both rounded stochastically. Checkpoints hold fp32 in any
    case, and a run may resume with another format. `--optimizer.state` is the same flag."""
    tf32: bool = True
    """Let fp32 matrix products and convolutions on NVIDIA GPUs use TF32 (10 bits of mantissa), as
    `lerobot-train` does. No effect elsewhere."""
    compile: bool = False
    """Compile the decoder and encoder layers of pi0_fast by `torch.compile`, for passes with gradients. Each
    rank compiles in its first steps, a minute or more. Needs a C++ compiler; not with ZeRO-3."""

    def resolve(self) -> None:
        """Resolve `auto` and check the combination.

        Raises:
            UserError: Names the flag and what to do.
        """
        check_choice("--engine", self.name, EngineName)
        check_choice("--engine.dtype", self.dtype, EngineDtype)
        check_choice("--engine.optimizer_state", self.optimizer_state, OptimizerState)
        if self.name == "auto":
            self.name = "zero" if self.ds_config else "fsdp" if launched_world_size() > 1 else "single"
        require(
            self.name != "zero" or bool(self.ds_config),
            "--engine=zero needs --ds_config, for example --ds_config zero3",
        )
        require(
            self.name == "zero" or not self.ds_config,
            f"--ds_config={self.ds_config} has no meaning with --engine={self.name}: omit one of them",
        )
        self.fsdp.validate()
        require(
            self.name == "fsdp" or self.fsdp == FsdpConfig(),
            f"--engine.fsdp.* has no meaning with --engine={self.name}: omit it, or set --engine=fsdp",
        )


@dataclass
class WorldEvalConfig:
    """Evaluation in an embedded world every `eval_freq` steps: the flags `--world.*`."""

    name: str = ""
    """World to evaluate in, `metaworld`, `blocks` or `cw10`; empty: none."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to run, as a list; empty: all tasks of the world, old and new."""
    episodes: int = 10
    """Episodes per task, over all ranks."""
    seed: int = 1000
    """Seed of the scenes, which are the same in every evaluation and in `craft-ds eval`."""

    def validate(self, eval_freq: int) -> None:
        """Check the fields without building the world.

        Args:
            eval_freq: Steps between evaluations; 0: no evaluation.

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
            raise UserError(
                f"--world.name={self.name} is evaluated every --eval_freq steps: set --eval_freq too"
            )


@dataclass
class ProfileConfig:
    """Profile of some steps, written to `OUTPUT/profile/`: the flags `--profile.*`."""

    steps: int = 0
    """Steps to record; 0: no profile. Each rank writes a Chrome trace, on CUDA a memory snapshot, and the
    mean seconds of each phase of a step. Choose at least `--craft.retention_freq`, so that a retention step
    is among them."""
    skip: int = 5
    """Steps of this start before the first one that is recorded, at least 1; a resumed run records too."""

    def validate(self, total_steps: int) -> None:
        """Check every field for itself.

        Args:
            total_steps: Steps of the run.

        Raises:
            UserError: Names the flag and what it must be.
        """
        require(self.steps >= 0, f"--profile.steps={self.steps} must be at least 0")
        require(self.skip >= 1, f"--profile.skip={self.skip} must be at least 1")
        if not self.steps:
            require(
                self.skip == ProfileConfig().skip,
                f"--profile.skip={self.skip} has no effect without --profile.steps: add it, or omit it",
            )
            return
        require(
            self.skip < total_steps,
            f"--profile.skip={self.skip} of --steps={total_steps} leaves no step to record: lower it",
        )


@dataclass
class RunOptions:
    """The flags that craft-ds adds to those of `lerobot-train`."""

    craft: CraftConfig = field(default_factory=CraftConfig)
    """The retention constraint, `--craft.*`."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """Penalty on the distance from the start, `--penalty.*`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sharding of the model, `--engine.*`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train instead of the policy's own weights, `--lora.*`. LeRobot's `--peft.*` is an
    alternative."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profile of some steps, `--profile.*`."""
    world: WorldEvalConfig = field(default_factory=WorldEvalConfig)
    """Evaluation in an embedded world every `eval_freq` steps, `--world.*`."""
    datasets: list[DatasetSource] = field(default_factory=list)
    """Several data sets to train on as one mixture, in place of `--dataset.repo_id` and `--dataset.root`:
    `'[{repo_id: me/a, root: data/a, weight: 2}, {repo_id: me/b, root: data/b, weight: 1}]'`. `weight` is the
    share of the samples; without weights, every frame counts the same. An entry may also have `episodes`."""
    normalization: Normalization = "policy"
    """Statistics that normalise state and action: `policy` keeps those that the policy was trained with,
    which old and new tasks then share; `dataset` takes those of `--dataset.repo_id`, as `lerobot-train` does.
    They are saved with the policy."""
    allow_missing_cameras: bool = False
    """Train on a data set that lacks some of the policy's cameras: pi0_fast and its relatives mask them. At
    least one camera is needed."""
    data_check: DataCheck = "error"
    """What the data report finds at the start of a run: `error` stops where training cannot be right, `warn`
    only prints it, `off` skips the report. In a YAML file, `"off"` needs its quotes."""
    data_report: DataReportConfig = field(default_factory=DataReportConfig)
    """Sampling and thresholds of the data report, `--data_report.*`."""
    eval_freq: int = 0
    """Steps between reports of the held-out task loss and the anchor loss; 0: none. Holds out the last
    episodes of every task: the share `--dataset.eval_split` of them, 0.05 if it is not given, and at least
    one. `--eval_steps` is LeRobot's name of the same flag."""
    eval_steps: int = 0
    """LeRobot's name for `--eval_freq`."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of `batch_size` per rank and step."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full` stores only the inputs of decoder and encoder layers and recomputes the rest in the backward
    pass: less memory, about a third more computation. `none` stores all activations. LeRobot's
    `--policy.gradient_checkpointing=true` means `full`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Format of checkpoints, `--checkpoint.*`."""
    save_total_limit: int = 0
    """Number of periodic checkpoints to keep, the newest ones; 0: all. An older one is deleted once a newer
    one is complete and verified. `final` is always kept."""
    keep_period: int = 0
    """Keep every periodic checkpoint whose step is a multiple of this; 0: none."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the trained weights, such as 0.99; 0: none.
    Checkpoints hold it beside the weights, and `craft-ds export --ema` writes it. It takes 4 bytes per
    trained parameter, sharded."""
    save_best: bool = False
    """Point the link `best` at the checkpoint with the lowest held-out task loss among those whose loss on
    held-out anchors is at most ε at their step, or nearest to it if there is none. Evaluates before every
    periodic and the final save; `save_total_limit` does not delete the best. Needs `--dataset.eval_split`."""
    early_stop_patience: int = 0
    """Stop training, and save `final`, after this many evaluations in a row in which the held-out task loss
    did not improve on its best; 0: never. Needs `--eval_freq` or `--save_best=true`."""
    log_to: str = ""
    """Trackers besides `metrics.jsonl`, separated by commas: wandb, tensorboard, trackio.
    `--wandb.enable=true` means wandb; `--wandb.project` names the project of trackio too."""
    max_runtime: str = ""
    """Time after which the run finishes its step, saves and exits with status 75: seconds, or a number with
    a unit, such as 30m, 3.5h or 2d; empty: no limit. Allow time for one step and one save."""
    rank_timeout: float = RANK_TIMEOUT_S
    """Seconds without progress after which the run stops and names the rank that it waited for; and seconds
    to wait at the start for all ranks to join."""
    max_skipped_steps: int = 10
    """Number of consecutive steps with a non-finite loss or gradient that are skipped; one more stops the
    run."""
    on_bad_sample: OnBadSample = "error"
    """A sample that cannot be read (damaged picture, cut video, missing file, timestamp beyond
    `--tolerance_s`) or whose state or action is non-finite or an outlier: `error` stops the run with a line
    that names data set, episode and frame; `skip` trains another sample instead, the same on every resume and
    for any number of ranks, and logs and counts it as `train/bad_samples`."""
    outlier_factor: float = 20.0
    """A state or action entry is an outlier if it lies more than this many times the usual range outside of
    that range, which holds the central nine tenths of the data set's frames. An entry that hardly moves has
    the widest range of its vector. 0: only non-finite entries are bad."""
