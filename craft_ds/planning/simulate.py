"""One pass of a policy's loss on tensors without storage: the bytes it keeps alive, event by event.

Nothing about attention, normalisation or checkpointing is modelled: PyTorch's own operators run and its
autograd saves what it saves, on `FakeTensor`s. What engines add depends on when a unit's parameters are
gathered and when a gradient is ready, so the trace has one entry between any two such events.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoProcessor, AutoTokenizer

from craft_ds.activation_checkpointing import checkpoint_activations
from craft_ds.errors import UserError
from craft_ds.memory_counter import MemoryCounter
from craft_ds.policies.adapter import token_loss
from craft_ds.policies.skeleton import build_skeleton
from craft_ds.policies.units import shard_units

EventKind = Literal["start", "end", "forward", "forward_end", "backward", "gradient"]


@dataclass(frozen=True)
class Workload:
    """What one micro-batch looks like.

    Attributes:
        batch_size: Samples.
        prompt_length: Prompt tokens of the longest sample, the state included.
        action_length: Action tokens of the longest sample; all but the first are supervised.
        cameras: Images a sample; None: as many as the policy has.
    """

    batch_size: int = 8
    prompt_length: int = 80
    action_length: int = 100
    cameras: int | None = None

    @property
    def supervised(self) -> int:
        """Tokens that `lm_head` predicts."""
        return self.batch_size * max(self.action_length - 1, 0)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: Of each adapter.
        mlp: Adapt the feed-forward layers of the decoder too, not only its attention.
    """

    rank: int
    mlp: bool = True

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the adapted linear layers."""
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        return attention + ("gate_proj", "up_proj", "down_proj") * self.mlp


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together.

    Attributes:
        name: Of the module; empty for what belongs to no unit.
        trainable: Elements of its trainable parameters.
        frozen: Elements of its frozen parameters.
        sizes: Elements of each of its parameters.
    """

    name: str
    trainable: int
    frozen: int
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """All its elements."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Event:
    """Something that engines react to, and the pass's own memory until the next event.

    Attributes:
        kind: `forward` and `forward_end` of a unit; `backward`: the gradient of its output is there;
            `gradient`: that of one of its parameters is.
        unit: Index of the unit.
        numel: Elements of the gradient that is ready.
        live: Bytes alive at this event: activations and temporaries, without parameters and without the
            gradients that are already there.
        peak: The most that are alive from this event to the next.
    """

    kind: EventKind
    unit: int
    numel: int
    live: int
    peak: int


@dataclass(frozen=True)
class PassTrace:
    """A simulated pass.

    Attributes:
        units: The last one holds what belongs to no unit.
        events: In the order of time.
        kept: Bytes alive at the end of the forward pass.
        vocabulary: Width of the logits; 0 where the policy has none.
    """

    units: tuple[Unit, ...]
    events: tuple[Event, ...]
    kept: int
    vocabulary: int

    @property
    def trainable(self) -> int:
        """Elements of all trainable parameters."""
        return sum(unit.trainable for unit in self.units)

    @property
    def frozen(self) -> int:
        """Elements of all frozen parameters."""
        return sum(unit.frozen for unit in self.units)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(size for unit in self.units for size in unit.sizes)


def skeleton_without_tokenizers(config: PreTrainedConfig) -> PreTrainedPolicy:
    """`build_skeleton` where no tokenizer is at hand: the policy can compute its loss, but not act.

    Raises:
        UserError: The policy cannot be built, for example because it fetches a part from the hub.
    """
    if not isinstance(config, PI0FastConfig):
        try:
            return build_skeleton(config)
        except Exception as error:
            raise UserError(
                f"cannot build a policy of type {config.type} without weights: {error}"
            ) from error

    class NoTokenizer:
        vocab_size = getattr(config, "vocab_size", None)

    with (
        patch.object(AutoTokenizer, "from_pretrained", return_value=NoTokenizer()),
        patch.object(AutoProcessor, "from_pretrained", return_value=NoTokenizer()),
    ):
        return build_skeleton(config)


def simulate_pass(
    config: PreTrainedConfig,
    workload: Workload,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    checkpointing: bool = False,
    lora: Lora | None = None,
    freeze: Callable[[PreTrainedPolicy], None] | None = None,
) -> PassTrace:
    """Run one forward and backward pass of a pi0_fast without allocating anything.

    Args:
        config: Of a pi0_fast of any size; not changed.
        workload: The micro-batch.
        dtype: Of the forward pass.
        autocast: Parameters stay fp32 and are cast as they are used (the single-process engine), instead of
            being gathered in `dtype`.
        checkpointing: As `--activation_checkpointing=full`.
        lora: Adapters; all other parameters are then frozen.
        freeze: Sets `requires_grad` of the policy's parameters. Frozen ones are kept in `dtype`.

    Raises:
        UserError: The policy is not a pi0_fast: the shape of its batches is not known here.
    """
    if not isinstance(config, PI0FastConfig):
        raise UserError(f"policy type {config.type}: activations can be planned for pi0_fast only")
    config = _with_cameras(config, workload.cameras)
    policy = skeleton_without_tokenizers(config).train()
    assert isinstance(policy, PI0FastPolicy)
    if lora is not None:
        _adapt_(policy, lora)
    if freeze is not None:
        freeze(policy)
    units = shard_units(policy)
    if checkpointing:
        checkpoint_activations(policy)
    described = _describe(policy, units)

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stored = torch.float32 if autocast else dtype
    with fake:
        _to_fake_(policy, stored, frozen=dtype)
    recorder = _Recorder()
    recorder.watch(policy, units)
    batch = _batch(config, workload, fake)
    casts = torch.autocast("cpu", dtype) if autocast and dtype != torch.float32 else nullcontext()
    with recorder.counter:
        with casts:
            loss = token_loss(policy, batch)
        kept = recorder.counter.live
        loss.total.backward()
        recorder.note("end", -1)
    vocabulary = policy.model.paligemma_with_expert.paligemma.lm_head.weight.shape[0]
    return PassTrace(described, tuple(recorder.events), kept, vocabulary)


class _Recorder:
    """Cuts the memory of a pass into the stretches between events."""

    def __init__(self) -> None:
        self.counter = MemoryCounter()
        self.events: list[Event] = [Event("start", -1, 0, 0, 0)]

    def note(self, kind: EventKind, unit: int, numel: int = 0) -> None:
        """End the current stretch and begin another."""
        self.events[-1] = replace(self.events[-1], peak=self.counter.peak)
        self.counter.peak = self.counter.live
        self.events.append(Event(kind, unit, numel, self.counter.live, self.counter.live))

    def watch(self, policy: nn.Module, units: list[nn.Module]) -> None:
        """Note when units run and when gradients are ready. Gradients are dropped: engines keep their own."""
        owner: dict[int, int] = {}
        for index, unit in enumerate(units):
            owner |= {id(parameter): index for parameter in unit.parameters()}
            unit.register_forward_pre_hook(lambda *_, index=index: self.note("forward", index))
            unit.register_forward_hook(lambda *_, index=index: self._leave(index, _[-1]))
        for parameter in policy.parameters():
            if parameter.requires_grad:
                index = owner.get(id(parameter), len(units))
                parameter.register_post_accumulate_grad_hook(partial(self._gradient, index))

    def _leave(self, index: int, output: Any) -> None:
        self.note("forward_end", index)
        if isinstance(output, Tensor) and output.requires_grad:
            # The gradient of a unit's output is there: its backward pass begins.
            output.register_hook(lambda _: self.note("backward", index))

    def _gradient(self, index: int, parameter: Tensor) -> None:
        parameter.grad = None
        self.note("gradient", index, parameter.numel())


class _Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as PEFT computes it."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, base.out_features, bias=False, device="meta")

    @property
    def weight(self) -> Tensor:
        """The base's: policies read its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Base and adapter; the adapter computes in its own dtype."""
        result = self.base(x)
        return (result + self.up(self.down(x.to(self.down.weight.dtype))) * 1.0).to(result.dtype)


def _adapt_(policy: PI0FastPolicy, lora: Lora) -> None:
    policy.requires_grad_(False)
    decoder = policy.model.paligemma_with_expert.paligemma.model.language_model
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if name in lora.targets and isinstance(child, nn.Linear):
                setattr(module, name, _Adapted(child, lora.rank))


def _describe(policy: nn.Module, units: list[nn.Module]) -> tuple[Unit, ...]:
    names = {id(module): name for name, module in policy.named_modules()}
    seen: set[int] = set()

    def unit(name: str, module: nn.Module) -> Unit:
        parameters = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        return Unit(name, trainable, frozen, tuple(p.numel() for p in parameters))

    described = [unit(names[id(module)], module) for module in units]
    return (*described, unit("", policy))


def _to_fake_(policy: nn.Module, trainable: torch.dtype, frozen: torch.dtype) -> None:
    """Replace parameters and buffers by fake ones, in the dtypes in which forward meets them."""
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = trainable if parameter.requires_grad else frozen
                empty = torch.empty(parameter.shape, dtype=kind)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _with_cameras(config: PI0FastConfig, cameras: int | None) -> PI0FastConfig:
    others = {k: v for k, v in (config.input_features or {}).items() if v.type is not FeatureType.VISUAL}
    count = cameras if cameras is not None else max(len(config.image_features), 1)
    image = PolicyFeature(FeatureType.VISUAL, (3, *config.image_resolution))
    images = {f"observation.images.camera{i}": image for i in range(count)}
    features = {
        "input_features": images | others,
        "output_features": config.output_features or {"action": PolicyFeature(FeatureType.ACTION, (7,))},
    }
    return replace(config, **features, device="cpu", gradient_checkpointing=False, compile_model=False)


def _batch(config: PI0FastConfig, workload: Workload, fake: FakeTensorMode) -> dict[str, Tensor]:
    """Fake images and tokens. Masks decide shapes and are therefore real."""
    count, prompt, action = workload.batch_size, workload.prompt_length, workload.action_length
    with fake:
        batch = {
            name: torch.empty(count, *feature.shape) for name, feature in config.image_features.items()
        } | {
            OBS_LANGUAGE_TOKENS: torch.zeros(count, prompt, dtype=torch.long),
            ACTION_TOKENS: torch.zeros(count, action, dtype=torch.long),
        }
    return batch | {
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(count, prompt, dtype=torch.bool),
        ACTION_TOKEN_MASK: torch.ones(count, action, dtype=torch.bool),
    }
