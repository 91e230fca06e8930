"""Checks of the options of `--craft.merging` and `--craft.multiplier`, and of what they allow."""

import math
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from craft_ds.errors import UserError

if TYPE_CHECKING:
    from craft_ds.config.craft_config import CraftConfig


def check_rules(craft: "CraftConfig") -> None:
    """Check the ranges of the rules' options, and refuse options that have no effect.

    Raises:
        UserError: Names the flags and what to do.
    """
    for name in ("cagrad_c", "nupi_kp", "nupi_ki", "barrier_beta"):
        value = getattr(craft, name)
        if not 0.0 <= value < math.inf:
            raise UserError(f"--craft.{name}={value} must be finite and not negative")
    if not -1.0 < craft.nupi_nu < 1.0:
        raise UserError(f"--craft.nupi_nu={craft.nupi_nu} must lie in (-1, 1)")
    if craft.nupi_kp == 0.0 and craft.nupi_ki == 0.0:
        raise UserError(
            "--craft.nupi_kp=0 with --craft.nupi_ki=0 never changes λ: use --craft.multiplier=fixed"
        )

    defaults = {field.name: field.default for field in fields(craft) if field.default is not MISSING}
    for name, reason in _without_effect(craft).items():
        value = getattr(craft, name)
        if value != defaults[name]:
            shown = str(value).lower() if isinstance(value, bool) else value
            raise UserError(
                f"--craft.{name}={shown} has no effect with {reason}: omit one of them; a preset's value is "
                f"replaced by --craft.{name}={str(defaults[name]).lower()}"
            )

    plain = craft.merging == "guide" and craft.projection_mode == "weighted" and not craft.use_grad_projection
    if craft.multiplier == "dynamic_barrier" and not plain:
        raise UserError(
            "--craft.multiplier=dynamic_barrier computes λ for g_t + λ·g_r without projection: add "
            "--craft.use_grad_projection=false, and omit --craft.merging and --craft.projection_mode"
        )
    _check_combinations(craft)


def _check_combinations(craft: "CraftConfig") -> None:
    """Check that a rule for merging or for λ can do what the other flags ask of it.

    Raises:
        UserError: Names the flags and what to use instead.
    """
    linear = ("guide", "pcgrad", "upgrad")
    for flag, rule, choices in (
        ("multiplier_scope=task", "merging", linear),
        ("multiplier_scope=task", "projection_mode", ("weighted",)),
        ("retention_scale=freq", "merging", linear),
        ("retention_scale=freq", "projection_mode", ("weighted", "task_priority")),
    ):
        name, asked = flag.split("=")
        value = getattr(craft, rule)
        if getattr(craft, name) == asked and value not in choices:
            raise UserError(
                f"--craft.{flag} needs a rule that adds λ·g_r, which --craft.{rule}={value} is not: use "
                f"{' or '.join(choices)}"
            )
    if craft.constraint_freq > 1 and craft.multiplier == "dynamic_barrier":
        raise UserError(
            "--craft.multiplier=dynamic_barrier computes λ from L_ret in every retention step: use "
            "--craft.constraint_freq=1, or another --craft.multiplier"
        )
    if craft.multiplier_scope == "task" and craft.multiplier == "dynamic_barrier":
        raise UserError(
            "--craft.multiplier=dynamic_barrier computes one λ from the gradients of all tasks together: use "
            "--craft.multiplier_scope=global, or another --craft.multiplier"
        )


def _without_effect(craft: "CraftConfig") -> dict[str, str]:
    """Return the fields that nothing reads, with the flag that is the reason."""
    merging, multiplier = f"--craft.merging={craft.merging}", f"--craft.multiplier={craft.multiplier}"
    unused: dict[str, str] = {}
    if craft.merging != "guide":
        unused |= dict.fromkeys(("projection_mode", "use_grad_projection"), merging)
    if craft.merging != "cagrad":
        unused["cagrad_c"] = merging
    if craft.multiplier != "nupi":
        unused |= dict.fromkeys(("nupi_nu", "nupi_kp", "nupi_ki"), multiplier)
    if craft.multiplier != "dynamic_barrier":
        unused["barrier_beta"] = multiplier
    if craft.multiplier in ("dynamic_barrier", "fixed"):
        unused["lambda_lr"] = multiplier
    if craft.multiplier == "dynamic_barrier":
        unused["initial_lambda"] = multiplier
    if craft.merging in ("agem", "mgda"):
        no_multiplier = f"{merging}, which has no λ"
        unused |= dict.fromkeys(("multiplier", "initial_lambda", "lambda_lr", "lambda_max"), no_multiplier)
    if craft.merging == "guide" and not craft.use_grad_projection:
        unused["surgery_scope"] = "--craft.use_grad_projection=false, which merges all layers alike"
    if craft.constraint_split == "train":
        unused["constraint_freq"] = "--craft.constraint_split=train, which needs no pass to measure L_ret"
    if craft.retention_freq == 1 and craft.retention_freq_max == 0:
        unused["retention_scale"] = "--craft.retention_freq=1"
    return unused
