"""A training run: everything around the loop, opened in the order in which it can fail."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline, RenameObservationsProcessorStep
from torch.optim.lr_scheduler import LRScheduler

from craft_ds.activation_checkpointing import checkpoint_activations
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.stream import AnchorStream
from craft_ds.anchors.vision import check_frozen_tower
from craft_ds.checkpoint import load_checkpoint, save_checkpoint, step_directory
from craft_ds.data import check_processors, heldout_batches, images_to_float, load_datasets, training_batches
from craft_ds.distributed import all_ranks, gather_objects, main_first, on_main
from craft_ds.dual import DualState, RetentionRecord
from craft_ds.engines import build_engine, check_engine, join_group
from craft_ds.engines.base import Batch, Engine
from craft_ds.engines.fsdp_layout import gathered_dtype
from craft_ds.errors import UserError
from craft_ds.inputs import check_inputs
from craft_ds.launch import launched_world_size
from craft_ds.lora.adapters import Adapters
from craft_ds.lora.weights import AdaptedWeights, open_weights
from craft_ds.metrics import MetricsLogger
from craft_ds.plots import plot_lambda_analysis
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.policies.loading import build_policy, load_processors, policy_cameras
from craft_ds.policies.units import wrapping_warning
from craft_ds.policies.weights import weights_sha256
from craft_ds.steps import PassSums, StepResult, measure
from craft_ds.system import peak_memory_bytes
from craft_ds.train_config import TrainConfig
from craft_ds.world.in_training import evaluate_in_world

HISTORY_CSV = "lambda_history.csv"
HISTORY_PLOT = "lambda_analysis.png"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch by step and rank alone, so that a resumed run draws what an unbroken one does."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


@dataclass
class Run:
    """One run on one rank.

    Attributes:
        config: The validated configuration.
        engine: Model, optimizer and ranks.
        dual: λ and its history.
        anchors: The old tasks' anchors; None for the baseline.
        start_step: Steps that a resumed checkpoint has behind it.
        output_dir: Directory of the run.
        owns_group: Whether the process group is the run's own, to be left at its end.
        adapters: What trains, if not the policy's own weights.
    """

    config: TrainConfig
    engine: Engine
    dual: DualState
    anchors: AnchorStream | None
    start_step: int
    output_dir: Path
    owns_group: bool
    adapters: Adapters | None
    policy_dir: Path
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    heldout: LeRobotDataset | None
    scheduler: LRScheduler | None
    logger: MetricsLogger
    batches: Iterator[dict[str, Any]]
    _latest: dict[str, float] = field(default_factory=dict)
    _losses: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _saved: Path | None = None

    @property
    def max_norm(self) -> float:
        """The norm to which gradients are clipped."""
        assert self.config.optimizer is not None
        return self.config.optimizer.grad_clip_norm

    def task_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next step, through the policy's processors."""
        for _ in range(self.config.gradient_accumulation_steps):
            yield self.preprocessor(images_to_float(next(self.batches)))

    def advance_scheduler(self) -> None:
        """Move the learning rate on by one step."""
        if self.scheduler is not None:
            self.scheduler.step()

    def record(
        self, step: int, result: StepResult, retention: RetentionRecord | None, *, seconds: float
    ) -> None:
        """Take note of a step; every `log_freq` steps, say it."""
        if step == self.start_step + 1 and result.applied:
            for line in ("forward pass", "backward pass", "optimizer step"):
                self.logger.say(f"✓ {line}")
        self._losses.append(result.loss)
        self._seconds.append(seconds)
        if retention is not None:
            self._latest |= {
                "craft/retention_loss": retention.retention_loss,
                "craft/lambda": self.dual.multiplier,
                "craft/epsilon": retention.epsilon,
                "craft/grad_conflict": float(retention.conflict),
                "craft/grad_dot": retention.dot,
                "craft/grad_cos": retention.cos,
                "craft/retention_weight": retention.retention_weight,
            }
        if not result.applied:
            self.logger.say(f"step {step} skipped: loss {result.loss}, gradient norm {result.grad_norm}")
        self.logger.advance()
        if self.config.log_freq > 0 and step % self.config.log_freq == 0:
            self.logger.log(
                step,
                {
                    "train/loss": sum(self._losses) / len(self._losses),
                    "train/grad_norm": result.grad_norm,
                    "train/lr": self.engine.optimizer.param_groups[0]["lr"],
                    **self._latest,
                    "time/step_s": sum(self._seconds) / len(self._seconds),
                    "memory/peak_mb": peak_memory_bytes(self.engine.device) / 2**20,
                },
            )
            self._losses.clear()
            self._seconds.clear()

    def after_step(self, step: int) -> None:
        """Evaluate and save where this step asks for it. Collective: call on all ranks."""
        config = self.config
        if config.eval_freq and step % config.eval_freq == 0:
            self.logger.log(step, self.evaluate())
        due = config.save_freq > 0 and step % config.save_freq == 0
        if config.save_checkpoint and due and step < config.steps:
            self._save(step_directory(self.output_dir, step), step)

    def evaluate(self) -> dict[str, float]:
        """Held-out task loss; with anchors, held-out anchor loss; with a world, success in it. Collective."""
        metrics = {}
        if self.heldout is not None:
            raw = heldout_batches(self.config, self.heldout, self.engine.rank, self.engine.world_size)
            batches = ((self.preprocessor(images_to_float(batch)), counts) for batch, counts in raw)
            metrics["eval/task_loss"] = self._mean_loss(batches)
        if self.anchors is not None:
            metrics["eval/anchor_loss"] = self._mean_loss(
                self.anchors.heldout_batches(self.config.max_eval_samples)
            )
        return metrics | evaluate_in_world(
            self.config.world,
            self.engine.act,
            self.preprocessor,
            self.postprocessor,
            self.engine.rank,
            self.engine.world_size,
        )

    def _mean_loss(self, batches: Iterator[tuple[Batch, bool]]) -> float:
        total = PassSums(*torch.zeros(2, dtype=torch.float64, device=self.engine.device))
        for batch, counts in batches:
            sums = measure(self.engine, [batch])
            if counts:
                total = PassSums(total.loss + sums.loss, total.tokens + sums.tokens)
        loss, tokens = self.engine.sum_scalars(torch.stack(total))
        return loss / tokens if tokens else math.nan

    def _save(self, directory: Path, step: int, *, final: bool = False) -> None:
        save_checkpoint(
            directory,
            engine=self.engine,
            config=self.config,
            policy_dir=self.policy_dir,
            scheduler_state=self.scheduler.state_dict() if self.scheduler else None,
            craft_state=self.dual.state_dict(),
            step=step,
            adapters=self.adapters,
            extra=self._write_history if final and self.anchors is not None else None,
        )
        self.logger.say(f"saved {directory}")

    def _write_history(self, directory: Path) -> None:
        self.dual.write_csv(directory / HISTORY_CSV)
        if self.dual.history:
            plot_lambda_analysis(directory / HISTORY_CSV, directory / HISTORY_PLOT)

    def finish(self) -> Path:
        """Write the final checkpoint. Collective: call on all ranks.

        Returns:
            Its directory, or the run's where `save_checkpoint` is false.
        """
        peaks = gather_objects(peak_memory_bytes(self.engine.device) / 2**20)
        self.logger.say("peak memory a rank: " + ", ".join(f"{peak:.0f} MiB" for peak in peaks))
        self.logger.log(self.config.steps, {"memory/peak_mb": max(peaks)})
        if not self.config.save_checkpoint:
            return self.output_dir
        self._save(self.output_dir / "final", self.config.steps, final=True)
        return self.output_dir / "final"

    def close(self) -> None:
        """Let go of the log and of the other ranks."""
        self.logger.close()
        self.engine.close()
        if self.owns_group:
            dist.destroy_process_group()


def open_run(config: TrainConfig) -> Run:
    """Check everything, then build everything. Collective: call on all ranks.

    Raises:
        UserError: On all ranks alike, before anything is written, and before the model is built
            wherever that can be known.
    """
    world_size = launched_world_size()
    config.validate()
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = not config.cudnn_deterministic
    ds_config = check_engine(config, world_size)
    owns_group = join_group(config)
    inputs = all_ranks(lambda: check_inputs(config))
    cameras = policy_cameras(config.policy)
    train, heldout = main_first(lambda: load_datasets(config, cameras, world_size))

    policy = all_ranks(lambda: build_fp32_policy(config.policy, inputs.weights_dir))
    base_sha256 = on_main(lambda: weights_sha256(inputs.weights_dir)) if inputs.plan else ""
    weights = all_ranks(
        lambda: open_weights(policy, inputs.policy_dir, inputs.plan, base_sha256, config.seed or 0)
    )
    adapters = weights.adapters if isinstance(weights, AdaptedWeights) else None
    if config.craft.enabled and config.craft.vision_features:
        all_ranks(lambda: check_frozen_tower(policy))
    size = _describe_size(policy, adapters)
    warning = _wrapping_warning(config, policy)
    if config.activation_checkpointing == "full":
        checkpoint_activations(policy)
    with weights:
        engine = build_engine(
            config,
            PolicyWithLoss(policy),
            weights.read,
            lambda: config.optimizer.build(policy.get_optim_params()),
            ds_config,
        )
    preprocessor, postprocessor = all_ranks(
        lambda: load_processors(config.policy, inputs.policy_dir, str(engine.device))
    )
    for processor in preprocessor.steps:
        if config.rename_map and isinstance(processor, RenameObservationsProcessorStep):
            processor.rename_map = config.rename_map
    all_ranks(lambda: check_processors(config, train, preprocessor))
    scheduler = config.scheduler.build(engine.optimizer, config.steps) if config.scheduler else None
    anchors = all_ranks(lambda: _open_anchors(config, inputs.cache, engine))
    dual = DualState(config.craft)

    start_step = 0
    if config.resume:
        scheduler_state, craft_state, start_step = load_checkpoint(config.checkpoint_path, engine, adapters)
        if scheduler is not None and scheduler_state is not None:
            scheduler.load_state_dict(scheduler_state)
            for group, rate in zip(engine.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        dual.load_state_dict(craft_state)
    batches = all_ranks(lambda: training_batches(config, train, engine.rank, engine.world_size, start_step))
    engine.barrier()  # nobody makes the output directory before everybody has seen that it is free
    logger = all_ranks(lambda: _open_logger(config, engine, start_step))
    logger.say(f"✓ data set: {train.num_episodes} episodes, {len(train)} samples")
    logger.say(f"✓ policy: {config.policy.type}, {size}, {_describe(engine, config)}")
    if warning:
        logger.say(f"warning: {warning}")
    return Run(
        config=config,
        engine=engine,
        dual=dual,
        anchors=anchors,
        start_step=start_step,
        output_dir=Path(config.output_dir),
        owns_group=owns_group,
        adapters=adapters,
        policy_dir=inputs.policy_dir,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        heldout=heldout,
        scheduler=scheduler,
        logger=logger,
        batches=batches,
    )


def build_fp32_policy(config: PreTrainedConfig, policy_dir: Path) -> PreTrainedPolicy:
    """The policy without weights, whose parameters will be fp32 whatever dtype its configuration names.

    `dtype=bfloat16`, as hub policies have it, would round the master weights before the first step and
    mix dtypes within a layer. The engine casts for forward and backward (`--engine.dtype`). Nor does the
    policy checkpoint its own activations: `--activation_checkpointing` does, in every engine.
    """
    config = copy.copy(config)
    if hasattr(config, "dtype"):
        config.dtype = "float32"
    if hasattr(config, "gradient_checkpointing"):
        config.gradient_checkpointing = False
    return build_policy(config, policy_dir)


def _open_anchors(config: TrainConfig, cache: AnchorCache | None, engine: Engine) -> AnchorStream | None:
    if cache is None:
        return None
    return AnchorStream(
        cache,
        config.craft,
        micro_batch_size=config.batch_size,
        device=engine.device,
        rank=engine.rank,
        world_size=engine.world_size,
        seed=config.seed or 0,
    )


def _open_logger(config: TrainConfig, engine: Engine, start_step: int) -> MetricsLogger:
    try:
        return MetricsLogger(
            Path(config.output_dir),
            config.steps,
            config.wandb,
            config.to_dict(),
            is_main=engine.rank == 0,
            resume_step=start_step if config.resume else None,
        )
    except OSError as error:
        raise UserError(f"--output_dir={config.output_dir} cannot be written: {error}") from error


def _wrapping_warning(config: TrainConfig, policy: PreTrainedPolicy) -> str | None:
    """FSDP2 gathers a unit at once; DeepSpeed gathers layer by layer, whatever the policy."""
    if config.engine.name != "fsdp":
        return None
    return wrapping_warning(policy, gathered_dtype(config.engine.fsdp, getattr(torch, config.engine.dtype)))


def _describe_size(policy: PreTrainedPolicy, adapters: Adapters | None) -> str:
    count = sum(parameter.numel() for parameter in policy.parameters())
    trainable = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    described = f"{count / 1e6:.2f} M parameters"
    if adapters is not None:
        described += f", {trainable / 1e6:.2f} M of them train ({adapters.describe()})"
    return described


def _describe(engine: Engine, config: TrainConfig) -> str:
    ranks = f"{engine.world_size} rank{'s' if engine.world_size > 1 else ''}"
    return f"{config.engine.name} engine on {ranks} ({engine.device.type}, {config.engine.dtype})"
