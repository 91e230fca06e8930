"""Modules of a policy that are sharded as units, and layers whose activations may be recomputed.

FSDP2 gathers a unit's parameters when the unit is *called*. A unit that is too large makes every rank hold
much of the model at once. A module that is used without calling it (through `.forward(`, by reading its
weight, or by calling its parts from outside, as pi0 does with the layers of its two decoders) should not be
a unit. `craft_ds.engines.fsdp_wrapping` gathers a unit whose parts are called from outside, but keeps it
until the backward pass.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Shares of the model: a unit above the first is split if possible; a module below the others is not worth a
# collective of its own. Members of a list are many, so they may be smaller.
_SPLIT_ABOVE, _MEMBER, _ATTRIBUTE, _LAYER_PART = 1 / 8, 1 / 1000, 1 / 50, 1 / 5000
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# These read the weights of their parts without calling them.
_INDIVISIBLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@singledispatch
def shard_units(policy: nn.Module) -> list[nn.Module]:
    """Return disjoint modules of a policy to shard as one unit each; the root shards all other parameters.

    A policy type without a registered function is split by size: members of lists and sequences, and
    submodules that the source of their parent calls, until none holds more than an eighth of the parameters
    or can be split. Register a function where `wrapping_warning` reports that this is not enough.

    Args:
        policy: Any policy; its parameters may be on the meta device.
    """
    return without_tied(policy, list(_split(policy, parameter_count(policy))))


@shard_units.register
def _pi0_fast_units(policy: PI0FastPolicy) -> list[nn.Module]:
    paligemma = policy.model.paligemma_with_expert.paligemma
    embedding = paligemma.model.language_model.embed_tokens
    return without_tied(policy, [*_pi0_fast_layers(policy), embedding, paligemma.lm_head])


def ends_forward(policy: nn.Module, unit: nn.Module) -> bool:
    """Return True if a unit is known to run last, so that the backward pass needs it next."""
    return isinstance(policy, PI0FastPolicy) and unit is policy.model.paligemma_with_expert.paligemma.lm_head


def only_looks_up(unit: nn.Module) -> bool:
    """Return True if a unit's backward pass does not read its parameters: that of an embedding."""
    return isinstance(unit, nn.Embedding)


@shard_units.register(PI0Policy)
@shard_units.register(PI05Policy)
def _pi0_units(policy: PI0Policy | PI05Policy) -> list[nn.Module]:
    model = policy.model.paligemma_with_expert
    text, expert = model.paligemma.model.language_model, model.gemma_expert
    # The heads are never called, so that they are never gathered.
    whole = [*model.paligemma.model.vision_tower.vision_model.encoder.layers, text.embed_tokens]
    heads = [model.paligemma.lm_head, expert.lm_head]
    parts = _layer_parts(policy, [*text.layers, *expert.model.layers])
    return without_tied(policy, [*whole, *parts, *heads])


@shard_units.register
def _smolvla_units(policy: SmolVLAPolicy) -> list[nn.Module]:
    model = policy.model.vlm_with_expert
    vlm = model.vlm.model
    whole = [*vlm.vision_model.encoder.layers, vlm.text_model.embed_tokens, model.vlm.lm_head]
    return without_tied(
        policy, [*whole, *_layer_parts(policy, [*vlm.text_model.layers, *model.lm_expert.layers])]
    )


def _layer_parts(policy: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the parts of decoder layers that are called one by one, since the attention of two decoders is
    computed together; the root shards the small ones."""
    total = parameter_count(policy)
    parts: list[nn.Module] = []
    for layer in layers:
        for name, part in layer.named_children():
            parts += part.children() if name == "self_attn" else [part]
    return [part for part in parts if parameter_count(part) >= max(_LAYER_PART * total, 1)]


@singledispatch
def checkpoint_units(policy: nn.Module) -> list[nn.Module]:
    """Return disjoint layers whose activations may be recomputed in the backward pass.

    Without a registered function: the units with submodules. Units with batch normalisation are excluded,
    since it would count every batch twice.
    """
    return [
        unit
        for unit in shard_units(policy)
        if any(True for _ in unit.children()) and not any(isinstance(m, _BatchNorm) for m in unit.modules())
    ]


@checkpoint_units.register
def _pi0_fast_layers(policy: PI0FastPolicy) -> list[nn.Module]:
    paligemma = policy.model.paligemma_with_expert.paligemma
    return [
        *paligemma.model.vision_tower.vision_model.encoder.layers,
        *paligemma.model.language_model.layers,
    ]


def without_tied(policy: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """Return the units that share no parameter with the rest of the policy.

    Tied parameters must be gathered together, whichever module runs first: by the root.
    """
    uses = _uses(policy)
    return [unit for unit in units if all(uses[key] == n for key, n in _uses(unit).items())]


def _uses(module: nn.Module) -> Counter[int]:
    """Count the attributes, over all modules, that hold each parameter."""
    return Counter(
        id(parameter)
        for part in module.modules()
        for _, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    )


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _split(module: nn.Module, total: int) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        size = parameter_count(child)
        smallest = _MEMBER if isinstance(module, _CONTAINERS) else _ATTRIBUTE
        is_unit = size >= smallest * total and _is_called(module, name, child)
        if is_unit and size <= _SPLIT_ABOVE * total:
            yield child
            continue
        parts = [] if isinstance(child, _INDIVISIBLE) else list(_split(child, total))
        if is_unit and sum(map(parameter_count, parts)) < size / 2:
            yield child
        else:
            yield from parts


def _is_called(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Return True if a submodule is known to be used by calling it only."""
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    if isinstance(parent, _CONTAINERS):
        return True
    try:
        # Without the constructor, where setting an initial weight does not count as a use.
        source = inspect.getsource(type(parent)).replace(inspect.getsource(type(parent).__init__), "")
    except (OSError, TypeError):
        return False
    otherwise = rf"\.{name}\.(weight|bias|forward)\b"
    return bool(re.search(rf"self\.{name}\(", source)) and not re.search(otherwise, source)


class LargestUnit(NamedTuple):
    """The unit that decides how much of a model each rank must hold at once.

    Attributes:
        name: Its name in the policy; empty for the parameters outside of all units.
        share: Its fraction of all parameters.
        gathered_bytes: Memory per rank while it is gathered.
    """

    name: str
    share: float
    gathered_bytes: int


def largest_unit(
    policy: nn.Module, units: list[nn.Module], dtype: torch.dtype = torch.float32
) -> LargestUnit:
    """Return the largest of the units and of the parameters outside of them.

    Args:
        policy: The full model, before sharding; it may be on the meta device.
        units: Disjoint modules of the model.
        dtype: Dtype in which parameters are gathered.
    """
    names = {id(module): name for name, module in policy.named_modules()}
    total = parameter_count(policy)
    sizes = {names[id(unit)]: parameter_count(unit) for unit in units}
    sizes[""] = total - sum(sizes.values())
    name = max(sizes, key=sizes.__getitem__)
    return LargestUnit(name, sizes[name] / max(total, 1), sizes[name] * dtype.itemsize)


def wrapping_warning(policy: nn.Module, dtype: torch.dtype = torch.float32) -> str | None:
    """Return a warning with the cost where more than half of a policy is gathered at once, else None.

    Args:
        policy: The policy, before sharding; it may be on the meta device.
        dtype: Dtype in which parameters are gathered.
    """
    name, share, gathered = largest_unit(policy, shard_units(policy), dtype)
    if share <= 0.5:
        return None
    what = f"the unit {name}" if name else "those outside of all units"
    return (
        f"{share:.0%} of the parameters are gathered at once ({what}): every rank holds {_size(gathered)} of "
        f"them beside its shard, and as much again for their gradient; register smaller units for "
        f"{type(policy).__name__} with craft_ds.policies.wrapping.shard_units"
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
