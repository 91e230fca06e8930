"""Checks of `--save_best` and `--early_stop_patience`, which need evaluations on held-out data."""

from typing import TYPE_CHECKING

from craft_ds.config.checks import require

if TYPE_CHECKING:
    from craft_ds.config.train_config import TrainConfig


def check_selection(config: "TrainConfig") -> None:
    """Check that checkpoints can be compared, and that there are evaluations to stop by.

    Args:
        config: With `eval_freq` and `dataset.eval_split` resolved.

    Raises:
        UserError: Names the flag and what to do.
    """
    patience = config.early_stop_patience
    require(
        not patience or bool(config.eval_freq) or config.save_best,
        f"--early_stop_patience={patience} counts evaluations, and none would run: set --eval_freq",
    )
    if not config.save_best:
        return
    require(
        config.save_checkpoint,
        "--save_best=true has no effect with --save_checkpoint=false: omit one of them",
    )
    require(
        0 < config.save_freq < config.steps,
        f"--save_best=true has nothing to choose from with --save_freq={config.save_freq} and "
        f"--steps={config.steps}, which save only final: set --save_freq below --steps",
    )
    require(
        not config.craft.enabled or config.craft.multiplier_scope == "global",
        "--save_best=true compares one L_ret with one ε, and --craft.multiplier_scope=task has them for each "
        "task: omit one of them",
    )
    require(
        config.dataset.eval_split > 0,
        "--save_best=true compares losses on held-out episodes of the task: hold some out with "
        "--dataset.eval_split=0.05, or with --eval_freq",
    )
