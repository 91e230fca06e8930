"""Which modules of a policy are gathered as one when it is sharded, and which are computed again.

FSDP2 gathers a unit's parameters when the unit is *called*. A unit that is too large makes every rank hold
much of the model at once; a module that is used in another way than by calling it (by `.forward(`, by reading
its weight) must not be a unit, since its parameters would not be there.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import singledispatch
from typing import NamedTuple

import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Shares of the model: a unit above the first is split where that is possible; a module below the others is
# not worth a collective of its own. Members of a list come in numbers, so they may be smaller.
_SPLIT_ABOVE, _MEMBER, _ATTRIBUTE = 1 / 8, 1 / 1000, 1 / 50
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# These read the weights of their parts without calling them.
_INDIVISIBLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@singledispatch
def shard_units(policy: nn.Module) -> list[nn.Module]:
    """Disjoint modules of a policy that are sharded as one each; what is in none of them goes to the root.

    A policy without an adapter of its own is split by size: members of lists and sequences, and submodules
    that the source of their parent calls, until none holds more than an eighth of the parameters or it
    cannot be split. Register an adapter where `wrapping_warning` says that this was not enough.

    Args:
        policy: Any policy; its parameters may lie on the meta device.
    """
    return without_tied(policy, list(_split(policy, parameter_count(policy))))


@shard_units.register
def _pi0_fast_units(policy: PI0FastPolicy) -> list[nn.Module]:
    paligemma = policy.model.paligemma_with_expert.paligemma
    embedding = paligemma.model.language_model.embed_tokens
    return without_tied(policy, [*_pi0_fast_layers(policy), embedding, paligemma.lm_head])


@singledispatch
def checkpoint_units(policy: nn.Module) -> list[nn.Module]:
    """Disjoint layers whose activations may be computed again in the backward pass.

    Without an adapter: the units that are more than one layer. A batch normalisation would count every batch
    twice, so what holds one is left out.
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
    """The units that share no parameter with the rest of the policy.

    Tied parameters must be gathered together, whichever of their modules runs first: by the root.
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
    """How many parameters a module has, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _split(module: nn.Module, total: int) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        size = parameter_count(child)
        smallest = _MEMBER if isinstance(module, _CONTAINERS) else _ATTRIBUTE
        whole = size >= smallest * total and _is_called(module, name, child)
        if whole and size <= _SPLIT_ABOVE * total:
            yield child
            continue
        parts = [] if isinstance(child, _INDIVISIBLE) else list(_split(child, total))
        if whole and sum(map(parameter_count, parts)) < size / 2:
            yield child
        else:
            yield from parts


def _is_called(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether a submodule is known to be used by calling it, and in no other way."""
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    if isinstance(parent, _CONTAINERS):
        return True
    try:
        # Without the constructor: setting an initial weight there is no use of it.
        source = inspect.getsource(type(parent)).replace(inspect.getsource(type(parent).__init__), "")
    except (OSError, TypeError):
        return False
    otherwise = rf"\.{name}\.(weight|bias|forward)\b"
    return bool(re.search(rf"self\.{name}\(", source)) and not re.search(otherwise, source)


class LargestUnit(NamedTuple):
    """The unit that decides how much of a model a rank must hold at once.

    Attributes:
        name: Its name in the policy; empty: what belongs to no unit.
        share: Its part of all parameters.
        gathered_bytes: What it takes on every rank while it is gathered.
    """

    name: str
    share: float
    gathered_bytes: int


def largest_unit(
    policy: nn.Module, units: list[nn.Module], dtype: torch.dtype = torch.float32
) -> LargestUnit:
    """The largest of some units and of what they leave to the root.

    Args:
        policy: The whole model, before it is sharded; it may lie on the meta device.
        units: Disjoint modules of it.
        dtype: Dtype in which parameters are gathered.
    """
    names = {id(module): name for name, module in policy.named_modules()}
    total = parameter_count(policy)
    sizes = {names[id(unit)]: parameter_count(unit) for unit in units}
    sizes[""] = total - sum(sizes.values())
    name = max(sizes, key=sizes.__getitem__)
    return LargestUnit(name, sizes[name] / max(total, 1), sizes[name] * dtype.itemsize)


def wrapping_warning(policy: nn.Module, dtype: torch.dtype = torch.float32) -> str | None:
    """One line where more than half of a policy is gathered at once, with its price; else None.

    Args:
        policy: The policy, before it is sharded; it may lie on the meta device.
        dtype: Dtype in which parameters are gathered.
    """
    name, share, gathered = largest_unit(policy, shard_units(policy), dtype)
    if share <= 0.5:
        return None
    what = f"the unit {name}" if name else "what belongs to no unit"
    return (
        f"{share:.0%} of the parameters are gathered at once ({what}): every rank holds {_size(gathered)} of "
        f"them beside its shard, and as much again for their gradient; register smaller units for "
        f"{type(policy).__name__} with craft_ds.policies.wrapping.shard_units"
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
