"""Simulation of one pass of a policy's loss on tensors without storage: bytes alive, event by event.

Attention, normalisation and checkpointing are not modelled: PyTorch's own operators run on `FakeTensor`s and
its autograd saves what it always saves. What engines add depends on when a unit's parameters are gathered
and when a gradient is ready, so the trace has one entry between any two such events.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from craft_ds.config.configs import LoraConfig
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.errors import UserError
from craft_ds.lora.adapters import add_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.memory_planner.shapes import (
    Unit,
    Workload,
    describe,
    fake_batch,
    meta_policy_without_tokenizers,
    to_fake_,
    with_cameras,
)
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.memory_planner.zero3_linear import zero3_linear
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.wrapping import shard_units

EventKind = Literal["start", "end", "forward", "forward_end", "backward", "gradient"]


@dataclass(frozen=True)
class Event:
    """An event that engines react to, and the pass's own memory until the next event.

    Attributes:
        kind: `forward` and `forward_end` of a unit; `backward`: the gradient of its output is ready;
            `gradient`: the gradient of one of its parameters is ready.
        unit: Index of the unit.
        numel: Number of elements of the gradient that is ready.
        live: Bytes alive at this event: activations and temporaries, without parameters and
            accumulated gradients.
        peak: Largest number of bytes alive from this event to the next.
    """

    kind: EventKind
    unit: int
    numel: int
    live: int
    peak: int


@dataclass(frozen=True)
class PassTrace:
    """Result of a simulated pass.

    Attributes:
        units: Parameters by unit; the last entry holds those that belong to no unit.
        events: Events in order of time.
        kept: Bytes alive at the end of the forward pass.
    """

    units: tuple[Unit, ...]
    events: tuple[Event, ...]
    kept: int

    @property
    def trainable(self) -> int:
        """Number of elements of all trainable parameters."""
        return sum(unit.trainable for unit in self.units)

    @property
    def frozen(self) -> int:
        """Number of elements of all frozen parameters."""
        return sum(unit.frozen for unit in self.units)


def simulate_pass(
    config: PreTrainedConfig,
    workload: Workload,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    checkpointing: bool = False,
    zero3: bool = False,
    lora: LoraConfig | None = None,
    prepare: Callable[[PreTrainedPolicy], None] | None = None,
) -> PassTrace:
    """Run one forward and backward pass of a pi0_fast without allocating anything.

    Args:
        config: Configuration of a pi0_fast of any size; not changed.
        workload: The micro-batch.
        dtype: Dtype of the forward pass.
        autocast: Parameters stay fp32 and are cast on use (the single-process engine), instead of being
            gathered in `dtype`.
        checkpointing: As `--activation_checkpointing=full`.
        zero3: Linear layers are DeepSpeed's, which ZeRO-3 substitutes for PyTorch's.
        lora: Flags of the adapters; None: none. Frozen parameters are kept in `dtype`.
        prepare: Changes the policy (what trains, number of layers) before adapters are added.

    Raises:
        UserError: The policy is not a pi0_fast, whose batch shapes are known here, or its type has no such
            preset of adapters.
    """
    if not isinstance(config, PI0FastConfig):
        raise UserError(f"policy type {config.type}: activations can be planned for pi0_fast only")
    config = with_cameras(config, workload.cameras)
    policy = meta_policy_without_tokenizers(config)
    assert isinstance(policy, PI0FastPolicy)
    if prepare is not None:
        prepare(policy)
    if lora is not None:
        add_adapters(policy, make_peft_config(lora, config, base_path=""))
    policy.train()
    units = shard_units(policy)
    if checkpointing:
        checkpoint_activations(policy)
    described = describe(policy, units)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stored = torch.float32 if autocast else dtype
    with fake:
        to_fake_(policy, stored, frozen=dtype)
    recorder = _Recorder()
    recorder.watch(policy, units)
    batch = fake_batch(config, workload, fake)
    casts = torch.autocast("cpu", dtype) if autocast and dtype != torch.float32 else nullcontext()
    with zero3_linear() if zero3 else nullcontext(), recorder.counter:
        with casts:
            loss = token_loss(policy, batch)
        kept = recorder.counter.live
        loss.total.backward()
        recorder.note("end", -1)
    return PassTrace(described, tuple(recorder.events), kept)


class _Recorder:
    """Splits the memory trace of a pass at its events."""

    def __init__(self) -> None:
        self.counter = MemoryCounter()
        self.events: list[Event] = [Event("start", -1, 0, 0, 0)]

    def note(self, kind: EventKind, unit: int, numel: int = 0) -> None:
        """End the current interval and start the next."""
        self.events[-1] = replace(self.events[-1], peak=self.counter.peak)
        self.counter.peak = self.counter.live
        self.events.append(Event(kind, unit, numel, self.counter.live, self.counter.live))

    def watch(self, policy: nn.Module, units: list[nn.Module]) -> None:
        """Record when units run and gradients are ready. Gradients are discarded: engines keep their own."""
        owner: dict[int, int] = {}
        for index, unit in enumerate(units):
            owner |= {id(parameter): index for parameter in unit.parameters()}
            unit.register_forward_pre_hook(lambda *_, index=index: self.note("forward", index))
            unit.register_forward_hook(lambda *_, index=index: self._exit(index, _[-1]))
        for parameter in policy.parameters():
            if parameter.requires_grad:
                index = owner.get(id(parameter), len(units))
                parameter.register_post_accumulate_grad_hook(partial(self._gradient, index))

    def _exit(self, index: int, output: Any) -> None:
        self.note("forward_end", index)
        if isinstance(output, Tensor) and output.requires_grad:
            # The gradient of the unit's output is ready: its backward pass starts.
            output.register_hook(lambda _: self.note("backward", index))

    def _gradient(self, index: int, parameter: Tensor) -> None:
        parameter.grad = None
        self.note("gradient", index, parameter.numel())
