"""Which modules of a policy are sharded and checkpointed as one."""

from functools import singledispatch

from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from torch import nn


@singledispatch
def shard_units(policy: nn.Module) -> list[nn.Module]:
    """Modules that are sharded as one, bottom-up."""
    return [m for m in policy.children() if any(True for _ in m.parameters())]


@shard_units.register
def _pi0_fast_units(policy: PI0FastPolicy) -> list[nn.Module]:
    paligemma = policy.model.paligemma_with_expert.paligemma
    decoder = paligemma.model.language_model
    return [
        *paligemma.model.vision_tower.vision_model.encoder.layers,
        *decoder.layers,
        decoder.embed_tokens,
        paligemma.lm_head,
    ]


@singledispatch
def checkpoint_units(policy: nn.Module) -> list[nn.Module]:
    """Layers whose activations are worth computing again."""
    return []


@checkpoint_units.register
def _pi0_fast_layers(policy: PI0FastPolicy) -> list[nn.Module]:
    paligemma = policy.model.paligemma_with_expert.paligemma
    return [
        *paligemma.model.vision_tower.vision_model.encoder.layers,
        *paligemma.model.language_model.layers,
    ]
