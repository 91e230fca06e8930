"""Gradient surgery in three scalars: conflict, projection, merge and clip.

A retention step has two gradients, g_t of the task loss and g_r of the retention loss. Surgery needs only
their Gram matrix, and every merged gradient is a linear combination a·g_t + b·g_r. So this module is
arithmetic on Python floats: the shards are read once for the Gram matrix and once to merge
(`craft_ds.algorithm.gram`), on any number of ranks.

The guide's projection is A-GEM's (Chaudhry et al. 2019, eq. 11) inside a primal-dual loop. Other rules are in
`craft_ds.algorithm.merging`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.algorithm.merging import merging_weights
from craft_ds.config.craft_config import CraftConfig

# Rules that project the task gradient where ⟨g_t, g_r⟩ < 0.
_PROJECTING = ("pcgrad", "agem", "upgrad")


class MergedGradient(NamedTuple):
    """Weights and properties of the merged gradient a·g_t + b·g_r.

    Attributes:
        a: Weight of the task gradient.
        b: Weight of the retention gradient (λ minus what the projection removes).
        conflict: True if the cosine is below the threshold.
        cosine: cos(g_t, g_r).
        norm: ‖a·g_t + b·g_r‖ without the retention scale, computed without another pass over the gradients:
            the norm that clipping divides by.
        removed: Share of ‖g_t‖² that its projection off g_r removes, tr²/(tt·rr); 0 if it is not projected.
        conflict_share: Share of the layers in conflict; 0 or 1 if all layers are merged as one gradient.
    """

    a: float
    b: float
    conflict: bool
    cosine: float
    norm: float
    removed: float = 0.0
    conflict_share: float = 0.0

    @property
    def retention_weight(self) -> float:
        """b/a, the weight of g_r relative to g_t; NaN if a is 0."""
        return self.b / self.a if self.a else math.nan


def merge(
    triple: GramTriple, multiplier: float, config: CraftConfig, retention_scale: float = 1.0
) -> MergedGradient:
    """Return the weights of the merged gradient by `config.merging`.

    The retention scale multiplies what λ adds to the gradient, and not the projection:
    (a, b) = (a, b)₀ + scale·((a, b)_λ − (a, b)₀), where (a, b)_λ are the weights at λ. `norm` is that of
    (a, b)_λ, so that clipping does not cancel the scale.

    Args:
        triple: Gram triple of the two gradients.
        multiplier: The Lagrange multiplier λ ≥ 0.
        config: `merging` is read, with `conflict_threshold` and what the rule needs.
        retention_scale: Steps since the last retention step (`--craft.retention_scale=freq`); else 1.

    Warning:
        The weights of a non-finite triple are meaningless: check `triple.is_finite` and skip the step.
    """
    cosine = triple.cosine
    conflict = cosine < config.conflict_threshold
    if config.merging == "guide":
        project = conflict and config.use_grad_projection and triple.rr > 0.0
    else:
        project = config.merging in _PROJECTING and cosine < 0.0
    a, b = _weights(triple, multiplier, project, config)
    norm = triple.norm(a, b)
    if retention_scale != 1.0:
        task_a, task_b = _weights(triple, 0.0, project, config)
        a, b = task_a + retention_scale * (a - task_a), task_b + retention_scale * (b - task_b)
    removed = cosine**2 if project else 0.0
    return MergedGradient(a, b, conflict, cosine, norm, removed, float(conflict))


def merge_layers(
    triples: Sequence[GramTriple], multiplier: float, config: CraftConfig, retention_scale: float = 1.0
) -> tuple[MergedGradient, list[MergedGradient]]:
    """Merge every layer by its own Gram triple.

    Args:
        triples: Gram triples of the layers, at least one.
        multiplier: λ.
        config: As for `merge`.
        retention_scale: As for `merge`.

    Returns:
        The complete gradient and each layer. Of the complete one, `norm` is the root of the layers' summed
        squares; `conflict` and `cosine` are those of the summed triples; `removed` is what the layers'
        projections remove together; `a` and `b` are means weighted by the layers' ‖g_t‖² and ‖g_r‖².
    """
    layers = [merge(triple, multiplier, config, retention_scale) for triple in triples]
    if len(layers) == 1:
        return layers[0], layers
    total = total_triple(triples)

    def mean(values: Sequence[float], weights: Sequence[float]) -> float:
        products = sum(value * weight for value, weight in zip(values, weights, strict=True))
        return products / sum(weights) if sum(weights) else sum(values) / len(values)

    task, retention = [triple.tt for triple in triples], [triple.rr for triple in triples]
    complete = MergedGradient(
        a=mean([layer.a for layer in layers], task),
        b=mean([layer.b for layer in layers], retention),
        conflict=total.cosine < config.conflict_threshold,
        cosine=total.cosine,
        norm=math.hypot(*(layer.norm for layer in layers)),
        removed=mean([layer.removed for layer in layers], task),
        conflict_share=sum(layer.conflict for layer in layers) / len(layers),
    )
    return complete, layers


def total_triple(triples: Sequence[GramTriple]) -> GramTriple:
    """Return the Gram triple of the complete gradients from those of disjoint parts."""
    return GramTriple(*(sum(products) for products in zip(*triples, strict=True)))


def _weights(
    triple: GramTriple, multiplier: float, project: bool, config: CraftConfig
) -> tuple[float, float]:
    if config.merging == "guide":
        return _guide_weights(triple.tr / triple.rr if project else 0.0, multiplier, config)
    return merging_weights(triple, multiplier, config) if triple.is_finite else (1.0, multiplier)


def _guide_weights(removed: float, multiplier: float, config: CraftConfig) -> tuple[float, float]:
    """Return (a, b) by `projection_mode`, with g_t − removed·g_r in the place of g_t.

    With a conflict (cos < `conflict_threshold`) and `use_grad_projection`, `removed` is tr/rr, which leaves
    g_t orthogonal to g_r. The modes are `weighted` g_t + λ·g_r, `equal` ½(g_t + g_r) and `task_priority`
    g_t + min(λ, 1)·g_r.
    """
    match config.projection_mode:
        case "weighted":
            return 1.0, multiplier - removed
        case "equal":
            return 0.5, 0.5 * (1.0 - removed)
        case "task_priority":
            return 1.0, min(multiplier, 1.0) - removed
        case mode:
            raise ValueError(f"unknown projection_mode {mode!r}")


def weights_without_projection(multiplier: float, config: CraftConfig) -> tuple[float, float]:
    """Return (a, b) of the guide's rule where nothing is projected: they do not depend on the gradients."""
    return _guide_weights(0.0, multiplier, config)


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that scales a gradient of this norm to at most `max_norm`.

    Equal to `torch.nn.utils.clip_grad_norm_`, including 1e-6 in the denominator; a `max_norm` of 0 or less
    means no clipping, as in LeRobot.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0.0 else 1.0
