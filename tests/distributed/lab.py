"""Laboratory of the scenarios: engines over small policies, and the results of a rank for comparison.

The same scenario runs on one process with the reference engine and on several ranks with every sharded
engine.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy import ToyPolicy, deal, samples

from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.config.configs import FsdpConfig, LoraConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.engines.base import Batch, Engine, ReadRange
from craft_ds.engines.compact_adam import compact
from craft_ds.engines.compiled_layers import compile_layers_
from craft_ds.engines.deepspeed_config import read_ds_config, resolve_ds_config
from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.engines.single import SingleEngine
from craft_ds.lora.adapters import Adapters, add_adapters, plan_adapters
from craft_ds.lora.weights import open_weights
from craft_ds.policies.loading import build_policy, load_policy, load_policy_config
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, TASK_INDEX
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import WeightReader, unique_tensors, weights_sha256
from craft_ds.testing.policies import random_batch, read_from

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
_TORCH_ADAM: dict = {"zero_force_ds_cpu_optimizer": False}
_OFFLOAD: dict = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
# The DeepSpeed file of each kind of engine, and the changes to it.
ZERO: dict[str, tuple[str, dict]] = {
    "zero3": ("zero3.json", {}),
    "zero3_bf16": ("zero3_bf16.json", {}),
    "zero3_offload": ("zero3_offload.json", {}),
    "zero3_offload_torch": ("zero3_offload.json", _TORCH_ADAM),
    "zero2": ("zero2.json", {}),
    "zero2_offload_torch": ("zero2.json", _OFFLOAD | _TORCH_ADAM),
}
FSDP: dict[str, FsdpConfig] = {
    "fsdp": FsdpConfig(),
    "fsdp_offload": FsdpConfig(cpu_offload=True),
    "fsdp_kept": FsdpConfig(reshard_after_forward=False),
    "hsdp": FsdpConfig(dp_replicate=2),
}


@dataclass
class Output:
    """Output of a scenario on one rank: parts of flat tensors by name, and plain values."""

    parts: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    values: dict = field(default_factory=dict)

    def add(self, prefix: str, parts: Iterator[tuple[str, int, Tensor]]) -> None:
        for name, start, tensor in parts:
            self.parts[f"{prefix}/{name}"] = (start, tensor.detach().cpu().clone())

    def save(self, directory: Path, name: str, rank: int) -> None:
        tensors = {f"{key}@{start}": tensor for key, (start, tensor) in self.parts.items()}
        save_file(tensors, directory / f"{name}.{rank}.safetensors")
        # The JSON file is written last: it marks the scenario as done.
        (directory / f"{name}.{rank}.json").write_text(json.dumps(self.values))


@dataclass
class Result:
    """Output of all ranks: complete flat tensors, and one dictionary of values per rank."""

    tensors: dict[str, Tensor]
    values: list[dict]

    @classmethod
    def of(cls, outputs: list[Output]) -> "Result":
        found: dict[str, dict[int, Tensor]] = {}
        for output in outputs:
            for key, (start, tensor) in output.parts.items():
                assert start not in found.setdefault(key, {}), f"{key}: element {start} is held twice"
                found[key][start] = tensor
        tensors = {}
        for key, parts in found.items():
            end = 0
            for start, tensor in sorted(parts.items()):
                assert start == end, f"{key}: elements {end} to {start} are held by no rank, or twice"
                end += tensor.numel()
            tensors[key] = torch.cat([tensor for _, tensor in sorted(parts.items())])
        return cls(tensors, [output.values for output in outputs])

    @classmethod
    def load(cls, directory: Path, name: str, world_size: int) -> "Result":
        outputs = []
        for rank in range(world_size):
            parts = {}
            for key, tensor in load_file(directory / f"{name}.{rank}.safetensors").items():
                label, start = key.rsplit("@", 1)
                parts[label] = (int(start), tensor)
            outputs.append(Output(parts, json.loads((directory / f"{name}.{rank}.json").read_text())))
        return cls.of(outputs)


@dataclass
class Lab:
    """A rank, and builders of its engines.

    Attributes:
        kind: Kind of engine: `single` (the reference), or a key of `ZERO` or `FSDP`.
        rank: This rank.
        world_size: Number of ranks.
        policy_dir: A tiny pi0_fast.
        scratch: A directory that all ranks, and later spawns, share.
    """

    kind: str
    rank: int
    world_size: int
    policy_dir: Path
    scratch: Path

    def engine(
        self,
        policy: nn.Module,
        read: ReadRange,
        *,
        dtype: str = "float32",
        persistence: int | None = None,
        lr: float = 1e-2,
        eps: float = 1e-8,
        optimizer_state: str = "fp32",
    ) -> Engine:
        """Build an engine over a policy, with AdamW.

        Args:
            policy: The policy, fp32, with or without values.
            read: Its weights.
            dtype: Dtype of forward and backward.
            persistence: ZeRO-3 keeps smaller parameters gathered; None: as in the shipped configuration.
            lr: Learning rate.
            eps: AdamW's epsilon.
            optimizer_state: Format of its moments.
        """
        module = PolicyWithLoss(policy)

        def build_optimizer():
            trainable = [p for p in policy.parameters() if p.requires_grad]
            adam = torch.optim.AdamW(trainable, lr=lr, eps=eps, weight_decay=0.1)
            return compact(adam, optimizer_state)

        torch_dtype = getattr(torch, dtype)
        if self.kind == "single":
            return SingleEngine(module, read, build_optimizer, torch.device("cpu"), torch_dtype)
        if self.kind in FSDP:
            return FsdpEngine(module, read, build_optimizer, FSDP[self.kind], torch_dtype)
        from craft_ds.engines.deepspeed import DeepSpeedEngine

        file, changes = ZERO[self.kind]
        config = read_ds_config(DS_CONFIGS / file)
        sections = {"zero_optimization": config["zero_optimization"] | changes.get("zero_optimization", {})}
        config |= changes | sections
        resolved = resolve_ds_config(
            config,
            path=file,
            batch_size=1,
            gradient_accumulation_steps=1,
            grad_clip_norm=1.0,
            bf16=dtype == "bfloat16",
            world_size=self.world_size,
            optimizer_state=optimizer_state,
        )
        if persistence is not None and resolved["zero_optimization"]["stage"] == 3:
            resolved["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
            # Nothing stays gathered from forward to backward either, as it would in a model of this size.
            resolved["zero_optimization"]["stage3_max_reuse_distance"] = 0
        return DeepSpeedEngine(module, read, build_optimizer, resolved)

    def toy_engine(self, policy: nn.Module | None = None, **options) -> Engine:
        policy = policy or ToyPolicy()
        read = read_from(policy)
        for tensor in unique_tensors(policy).values():
            tensor.detach().fill_(torch.nan)  # makes unread values visible
        return self.engine(policy, read, **options)

    def pi0_engine(
        self, policy_dir: Path | None = None, *, recompute: bool = False, compiled: bool = False, **options
    ) -> Engine:
        directory = policy_dir or self.policy_dir
        policy = build_policy(load_policy_config(directory), directory)
        with WeightReader(directory, policy) as weights:
            if compiled:
                compile_layers_(policy)
            if recompute:
                checkpoint_activations(policy)
            # Some attention gradients are zero except for rounding; AdamW must not divide them by themselves.
            return self.engine(policy, weights.read, eps=1e-4, **options)

    def lora_engine(
        self,
        lora: LoraConfig,
        directory: Path | None = None,
        *,
        recompute: bool = False,
        compiled: bool = False,
        **options,
    ) -> tuple[Engine, Adapters]:
        """Build an engine over the tiny pi0_fast with adapters: new ones, or those of a directory."""
        config = load_policy_config(self.policy_dir)
        config.pretrained_path = self.policy_dir
        plan = plan_adapters(lora, config, directory or self.policy_dir)
        policy = build_policy(config, plan.base)
        adapters = add_adapters(policy, plan.config, weights_sha256(plan.base))
        with open_weights(policy, self.policy_dir, plan, adapters) as weights:
            if compiled:
                compile_layers_(policy)
            if recompute:
                checkpoint_activations(policy)
            engine = self.engine(policy, weights.read, eps=1e-4, lr=1e-3, **options)
        return engine, adapters

    def toy_batches(self, step: int, accumulation: int, *, retention: bool = False) -> list[Batch]:
        return list(deal(samples(step, retention=retention), accumulation, self.rank, self.world_size))

    def pi0_batches(self, step: int, accumulation: int, retention_loss: str = "token_ce") -> list[Batch]:
        batch = random_batch(load_policy_config(self.policy_dir), 9, seed=step)
        batch[TASK_INDEX] = torch.arange(9) % 2
        if make_targets := RETENTION_LOSSES[retention_loss].targets:
            # Of the complete batch by one process: a target must not depend on the ranks. Another policy than
            # the trained one, from which a divergence would be a difference of equal numbers.
            teacher = load_policy(load_policy_config(self.policy_dir), self.policy_dir)
            rng = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in teacher.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
            batch |= to_policy_batch(make_targets(teacher, batch), "cpu")
        return list(deal(batch, accumulation, self.rank, self.world_size))

    def whole(self, batches, *args, **options) -> Batch:
        """Return the global batch, the same on all ranks, that `batches` divides among them."""
        (batch,) = batches.__func__(replace(self, rank=0, world_size=1), *args, 1, **options)
        return batch


def craft_config(mode: str = "weighted", threshold: float = 0.0, **changes) -> CraftConfig:
    return CraftConfig(enabled=True, projection_mode=mode, conflict_threshold=threshold, **changes)


def gradients(engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
    """Yield this rank's part of every accumulated gradient, by the library's own public calls."""
    policy = engine.module.policy
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if isinstance(engine, SingleEngine):
        engine.gradient()
        for name, parameter in trainable.items():
            yield name, 0, parameter.grad.reshape(-1)
        return
    if isinstance(engine, FsdpEngine):
        for shard in engine.shards():
            if shard.name in trainable:
                gradient = trainable[shard.name].grad
                local = torch.zeros_like(shard.master) if gradient is None else gradient.to_local()
                yield shard.name, shard.start, local.reshape(-1)
        return
    engine._layout.prepare_step()  # those calls read an offloaded gradient once it is complete
    if engine._engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_grad

        for name, parameter in trainable.items():
            full = safe_get_local_grad(parameter).reshape(-1)
            start = engine.rank * full.numel()
            numel = min(full.numel(), parameter.ds_numel - start)
            if numel > 0:
                yield name, start, full[:numel]
    else:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in trainable.items():
            full = safe_get_full_grad(parameter)
            if engine.rank == 0:
                yield name, 0, full.reshape(-1)


def masters(engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
    for shard in engine.shards():
        yield shard.name, shard.start, shard.master


def moments(engine: Engine) -> Iterator[tuple[str, int, Tensor]]:
    for shard in engine.shards():
        for key, values in shard.state.items():
            yield f"{shard.name}.{key}", shard.start, values
