"""Gradient surgery in three scalars: conflict, projection, merge and clip.

A retention step has two gradients, g_t of the task loss and g_r of the retention loss. Surgery needs only
their Gram matrix, and every merged gradient is a linear combination a·g_t + b·g_r. So this module is
arithmetic on Python floats: the shards are read once for the Gram matrix and once to merge
(`craft_ds.algorithm.gram`), on any number of ranks.

The projection is A-GEM's (Chaudhry et al. 2019, eq. 11) inside a primal-dual loop; PCGrad (Yu et al. 2020)
projects in the same way between two tasks.
"""

import math
from typing import NamedTuple

from craft_ds.config.configs import CraftConfig


class GramTriple(NamedTuple):
    """The Gram matrix of (g_t, g_r), summed over all shards.

    Attributes:
        tt: <g_t, g_t>, the squared norm of the task gradient.
        tr: <g_t, g_r>.
        rr: <g_r, g_r>, the squared norm of the retention gradient.
    """

    tt: float
    tr: float
    rr: float

    @property
    def cosine(self) -> float:
        """cos(g_t, g_r) in [-1, 1]; 0 if either gradient is zero, NaN if one is non-finite."""
        if self.tt == 0.0 or self.rr == 0.0:
            return 0.0
        # Two square roots, not the root of the product: tt·rr overflows long before the norms do.
        cosine = self.tr / (math.sqrt(self.tt) * math.sqrt(self.rr)) if self.is_finite else math.nan
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine

    @property
    def is_finite(self) -> bool:
        """True if all three entries are finite."""
        return math.isfinite(self.tt) and math.isfinite(self.tr) and math.isfinite(self.rr)

    def scaled(self, task: float, retention: float) -> "GramTriple":
        """Return the triple of (task·g_t, retention·g_r), computed from this one."""
        return GramTriple(self.tt * task**2, self.tr * task * retention, self.rr * retention**2)

    def norm(self, a: float, b: float) -> float:
        """Return ‖a·g_t + b·g_r‖ = sqrt(a²·tt + 2ab·tr + b²·rr)."""
        return math.sqrt(max(a * a * self.tt + 2.0 * a * b * self.tr + b * b * self.rr, 0.0))


class MergedGradient(NamedTuple):
    """Weights and properties of the merged gradient a·g_t + b·g_r.

    Attributes:
        a: Weight of the task gradient.
        b: Weight of the retention gradient (λ minus what the projection removes).
        conflict: True if the cosine is below the threshold.
        cosine: cos(g_t, g_r).
        norm: ‖a·g_t + b·g_r‖, computed without another pass over the gradients.
    """

    a: float
    b: float
    conflict: bool
    cosine: float
    norm: float

    @property
    def retention_weight(self) -> float:
        """b/a, the weight of g_r relative to g_t; NaN if a is 0."""
        return self.b / self.a if self.a else math.nan


def merge(triple: GramTriple, multiplier: float, config: CraftConfig) -> MergedGradient:
    """Return the weights of the merged gradient.

    With a conflict (cos < `conflict_threshold`) and `use_grad_projection`, g_t is replaced by
    g_t − (tr/rr)·g_r, which is orthogonal to g_r. Then, by `projection_mode`:
    `weighted` g_t + λ·g_r, `equal` ½(g_t + g_r), `task_priority` g_t + min(λ, 1)·g_r.

    Args:
        triple: Gram triple of the two gradients.
        multiplier: The Lagrange multiplier λ ≥ 0.
        config: `use_grad_projection`, `conflict_threshold` and `projection_mode` are read.

    Warning:
        The weights of a non-finite triple are meaningless: check `triple.is_finite` and skip the step.
    """
    cosine = triple.cosine
    conflict = cosine < config.conflict_threshold
    project = conflict and config.use_grad_projection and triple.rr > 0.0
    removed = triple.tr / triple.rr if project else 0.0
    match config.projection_mode:
        case "weighted":
            a, b = 1.0, multiplier - removed
        case "equal":
            a, b = 0.5, 0.5 * (1.0 - removed)
        case "task_priority":
            a, b = 1.0, min(multiplier, 1.0) - removed
        case mode:
            raise ValueError(f"unknown projection_mode {mode!r}")
    return MergedGradient(a, b, conflict, cosine, triple.norm(a, b))


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that scales a gradient of this norm to at most `max_norm`.

    Equal to `torch.nn.utils.clip_grad_norm_`, including 1e-6 in the denominator; a `max_norm` of 0 or less
    means no clipping, as in LeRobot.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0.0 else 1.0
