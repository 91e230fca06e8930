"""The flags `--penalty.*` as a dataclass. Imports neither torch nor LeRobot."""

import math
from dataclasses import dataclass
from typing import Literal

from craft_ds.config.checks import check_choice, require
from craft_ds.config.craft_config import CraftConfig

PenaltyName = Literal["none", "l2", "ewc"]


@dataclass
class PenaltyConfig:
    """Penalty on the distance from the policy that training started from: the flags `--penalty.*`.

    weight/2 · Σ F·(θ − θ_0)² over the trained parameters is added to the task loss in every step, with or
    without CRaFT. With adapters, θ are the adapters and θ_0 their values at the start.
    """

    name: PenaltyName = "none"
    """`none`, `l2` (F = 1; L2-SP, Li et al. 2018, arXiv:1802.01483) or `ewc` (F is the diagonal of the
    empirical Fisher information on anchors; Kirkpatrick et al. 2017, arXiv:1612.00796)."""
    weight: float = 0.0
    """Weight of the penalty; above 0 with `l2` and `ewc`."""
    fisher_samples: int = 128
    """Anchors that F of `ewc` is a mean over, evenly from all tasks, at most those that train. Each costs a
    forward and backward pass of one sample at the start, and whenever the run is resumed."""

    def validate(self, craft: CraftConfig) -> None:
        """Check every field, and refuse those that have no effect.

        Args:
            craft: The anchor cache of `ewc` is `--craft.anchor_cache_dir`.

        Raises:
            UserError: Names the flag and what to do.
        """
        check_choice("--penalty.name", self.name, PenaltyName)
        default = PenaltyConfig()
        if self.name == "none":
            for flag in ("weight", "fisher_samples"):
                value = getattr(self, flag)
                require(
                    value == getattr(default, flag),
                    f"--penalty.{flag}={value} has no effect with --penalty.name=none: choose l2 or ewc, or "
                    "omit it",
                )
            return
        require(
            0.0 < self.weight < math.inf,
            f"--penalty.weight={self.weight} with --penalty.name={self.name} must be a number above 0",
        )
        require(
            craft.surgery_scope == "global",
            f"--craft.surgery_scope={craft.surgery_scope} does not include the penalty of "
            f"--penalty.name={self.name}: omit one of them",
        )
        if self.name == "l2":
            require(
                self.fisher_samples == default.fisher_samples,
                f"--penalty.fisher_samples={self.fisher_samples} has no effect with --penalty.name=l2: "
                "omit it",
            )
            return
        require(
            self.fisher_samples >= 1,
            f"--penalty.fisher_samples={self.fisher_samples} must be at least 1",
        )
        require(
            bool(craft.anchor_cache_dir),
            "--penalty.name=ewc computes F on anchors: set --craft.anchor_cache_dir (`craft-ds anchors` "
            "builds a cache); --craft.enabled may stay false",
        )
