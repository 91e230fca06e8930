"""Merging rules of the literature, for two gradients, as weights (a, b) of a·g_t + b·g_r.

Each rule is a closed form in the Gram triple. λ weights the retention gradient where that has a meaning, and
λ = 1 is the rule as published and as TorchJD computes it on the matrix with the rows g_t and g_r. A-GEM and
MGDA have no λ. Sums (`pcgrad`) and means (`cagrad`, `mgda`, `upgrad`) differ in the norm of the result, which
clipping and SGD see and Adam hardly does. A zero retention gradient leaves the task gradient to `pcgrad`,
`agem` and `upgrad`; to `mgda` and `cagrad` any zero gradient is a stationary point, and the result is 0.
"""

import math

from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.config.craft_config import CraftConfig

# ‖g_w‖² below this share of both ‖g‖² is rounding: the gradients are opposed, and no common descent exists.
STATIONARY = 1e-14


def merging_weights(triple: GramTriple, multiplier: float, config: CraftConfig) -> tuple[float, float]:
    """Return (a, b) by `config.merging`, which is any rule but `guide`.

    Args:
        triple: A finite Gram triple.
        multiplier: The Lagrange multiplier λ ≥ 0.
        config: `merging` and `cagrad_c` are read.

    Raises:
        ValueError: The rule is unknown.
    """
    match config.merging:
        case "pcgrad":
            return pcgrad(triple, multiplier)
        case "agem":
            return agem(triple)
        case "cagrad":
            return cagrad(triple, multiplier, config.cagrad_c)
        case "mgda":
            return mgda(triple)
        case "upgrad":
            return upgrad(triple, multiplier)
        case rule:
            raise ValueError(f"unknown merging {rule!r}")


def pcgrad(triple: GramTriple, multiplier: float = 1.0) -> tuple[float, float]:
    """Return the weights of PCGrad (Yu et al. 2020, arXiv:2001.06782, algorithm 1), a sum.

    With tr < 0 each gradient is projected off the other: (g_t − (tr/rr)·g_r) + λ·(g_r − (tr/tt)·g_t), so
    a = 1 − λ·tr/tt and b = λ − tr/rr; else g_t + λ·g_r. For two tasks the order of projections has no effect.
    λ scales g_r before merging, which only scales its projected part.
    """
    if triple.tr >= 0.0 or not _can_project(triple):
        return 1.0, multiplier
    return 1.0 - multiplier * triple.tr / triple.tt, multiplier - triple.tr / triple.rr


def agem(triple: GramTriple) -> tuple[float, float]:
    """Return the weights of A-GEM (Chaudhry et al. 2019, arXiv:1812.00420, eq. 11).

    With tr < 0 the task gradient is projected: g_t − (tr/rr)·g_r; else it stays. The retention gradient
    itself is not added, and there is no λ.
    """
    return 1.0, -triple.tr / triple.rr if triple.tr < 0.0 and _can_project(triple) else 0.0


def mgda(triple: GramTriple) -> tuple[float, float]:
    """Return the weights of MGDA (Désidéri 2012), the point of least norm between g_t and g_r; they sum to 1.

    a = clip((rr − tr) / ‖g_t − g_r‖², 0, 1) and b = 1 − a. There is no λ: a longer g_r would weigh *less*
    here, since the point of least norm lies near the shorter gradient.
    """
    tt, tr, rr = triple
    if tr >= min(tt, rr):  # an end of the segment; also where both gradients are the same
        return (1.0, 0.0) if tt <= rr else (0.0, 1.0)
    squared_distance = (tt - tr) + (rr - tr)
    # Both from their own numerator: 1 − a would lose the digits of a small b.
    return (rr - tr) / squared_distance, (tt - tr) / squared_distance


def upgrad(triple: GramTriple, multiplier: float = 1.0) -> tuple[float, float]:
    """Return the weights of UPGrad (Quinton & Rey 2024, arXiv:2406.16232), a mean.

    Each gradient is projected onto the dual cone of both, {x: ⟨x, g_t⟩ ≥ 0, ⟨x, g_r⟩ ≥ 0}, and the results
    are averaged, that of g_r with weight λ. For two gradients a projection onto this cone is PCGrad's, so the
    result is half of PCGrad's.
    """
    a, b = pcgrad(triple, multiplier)
    return 0.5 * a, 0.5 * b


def cagrad(triple: GramTriple, multiplier: float = 1.0, c: float = 0.5) -> tuple[float, float]:
    """Return the weights of CAGrad (Liu et al. 2021, arXiv:2110.14048, algorithm 1), not rescaled.

    With g_0 = ½(g_t + λ·g_r), r = c·‖g_0‖ and g_w = w·g_t + (1 − w)·g_r, the weight w in [0, 1] minimises
    ⟨g_w, g_0⟩ + r·‖g_w‖, and the result is g_0 + r·g_w/‖g_w‖: of all vectors within r of g_0 the one whose
    worse progress on the two losses is best. λ weights the mean g_0 only. Scaling g_r in g_w too would make a
    larger λ protect the *task*, since its progress would then be the worse one.

    Args:
        triple: A finite Gram triple.
        multiplier: λ.
        c: Radius relative to ‖g_0‖; 0: the mean.
    """
    tt, tr, rr = triple
    if c == 0.0:
        return 0.5, 0.5 * multiplier
    radius = c * triple.norm(0.5, 0.5 * multiplier)
    w, v = _cagrad_mixture(triple, multiplier, radius)
    squared_norm = w * w * tt + 2.0 * w * v * tr + v * v * rr
    if squared_norm <= STATIONARY * min(tt, rr):
        return 0.0, 0.0
    step = radius / math.sqrt(squared_norm)
    return 0.5 + step * w, 0.5 * multiplier + step * v


def _cagrad_mixture(triple: GramTriple, multiplier: float, radius: float) -> tuple[float, float]:
    """Return (w, 1 − w) at the minimum of the convex w ↦ ⟨g_w, g_0⟩ + r·‖g_w‖.

    Its slope is p + r·D·u/√(D·u² + m), with D = ‖g_t − g_r‖², m the least ‖g_w‖² on the line, u the distance
    from where that is, and p = ⟨g_t − g_r, g_0⟩. It is zero at u = −sign(p)·√(p²m / (D(r²D − p²))).
    """
    tt, tr, rr = triple
    squared_distance = (tt - tr) + (rr - tr)
    if squared_distance <= 0.0:
        return 0.5, 0.5
    slope = 0.5 * ((tt - tr) - multiplier * (rr - tr))
    room = radius * radius * squared_distance - slope * slope
    if room <= 0.0:  # the slope has one sign everywhere
        return (0.0, 1.0) if slope > 0.0 else (1.0, 0.0)
    least = max(tt * rr - tr * tr, 0.0) / squared_distance
    u = -math.copysign(math.sqrt(least / squared_distance / room), slope) * abs(slope)
    w, v = (rr - tr) / squared_distance + u, (tt - tr) / squared_distance - u
    if w <= 0.0:
        return 0.0, 1.0
    return (1.0, 0.0) if v <= 0.0 else (w, v)


def _can_project(triple: GramTriple) -> bool:
    """Return True if both gradients are non-zero, so that one can be projected off the other."""
    return triple.tt > 0.0 and triple.rr > 0.0
