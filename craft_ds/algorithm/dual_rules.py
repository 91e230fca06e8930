"""Rules for λ besides dual ascent, as functions on floats: the νPI controller and the dynamic barrier."""

import math
from typing import NamedTuple

from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.config.craft_config import CraftConfig


class NuPiStep(NamedTuple):
    """Result of one step of νPI.

    Attributes:
        multiplier: λ for the next retention step.
        smoothed_violation: ξ, the moving average of L_ret − ε.
    """

    multiplier: float
    smoothed_violation: float


def nupi(multiplier: float, smoothed_violation: float, violation: float, config: CraftConfig) -> NuPiStep:
    """Take one step of νPI (Sohrabi et al. 2024, arXiv:2406.04558, algorithm 1).

    With e = L_ret − ε: ξ' = ν·ξ + (1 − ν)·e and λ' = clip(λ + lambda_lr·(κi·e + κp·(ξ' − ξ)), 0, lambda_max).
    ξ starts at 0, Cooper's `nuPIInitType.ZEROS`: without clipping λ is then λ_0 + lambda_lr·(κi·Σe + κp·ξ),
    a PI controller. κp damps the oscillation of λ; κp = 0 and κi = 1 is dual ascent.

    Args:
        multiplier: λ.
        smoothed_violation: ξ of the last step; 0 at the start.
        violation: e = L_ret − ε.
        config: `nupi_nu`, `nupi_kp`, `nupi_ki`, `lambda_lr` and `lambda_max` are read.
    """
    smoothed = config.nupi_nu * smoothed_violation + (1.0 - config.nupi_nu) * violation
    change = config.nupi_ki * violation + config.nupi_kp * (smoothed - smoothed_violation)
    return NuPiStep(max(0.0, min(config.lambda_max, multiplier + config.lambda_lr * change)), smoothed)


def dynamic_barrier(triple: GramTriple, violation: float, config: CraftConfig) -> float:
    """Return λ of the dynamic barrier (Gong & Liu 2021, *Bi-objective Trade-off with Dynamic Barrier*).

    g_t + λ·g_r is the vector nearest to g_t whose dot product with g_r is at least φ = β·(L_ret − ε):
    λ = clip((φ − tr)/rr, 0, lambda_max). It has no state. Where L_ret is far below ε, φ is negative and even
    a conflict is left alone; where it is above, L_ret must fall. 0 if g_r is zero.

    Args:
        triple: Gram triple of the mean gradients.
        violation: L_ret − ε.
        config: `barrier_beta` and `lambda_max` are read.
    """
    if triple.rr <= 0.0 or not (triple.is_finite and math.isfinite(violation)):
        return 0.0  # a non-finite step is skipped
    return max(0.0, min(config.lambda_max, (config.barrier_beta * violation - triple.tr) / triple.rr))
