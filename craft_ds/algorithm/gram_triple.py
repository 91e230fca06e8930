"""The Gram matrix of the two gradients of a retention step, as three scalars."""

import math
from typing import NamedTuple


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
