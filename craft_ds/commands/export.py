"""`craft-ds export`: turn a checkpoint into a policy directory that stock LeRobot loads."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from craft_ds.config.craft_config import RetentionLossName
from craft_ds.errors import UserError

_SEARCH_FLAGS = (
    "alphas",
    "anchor_cache_dir",
    "epsilon",
    "epsilon_relative",
    "retention_loss",
    "dataset_repo_id",
    "dataset_root",
    "max_eval_samples",
)


def main(arguments: Sequence[str]) -> None:
    """Export the checkpoint that the flags name."""
    parser = argparse.ArgumentParser(
        prog="craft-ds export",
        description="Export a checkpoint as a policy directory that stock LeRobot loads.",
    )
    parser.add_argument("checkpoint", type=Path, help="directory such as outputs/run/final")
    parser.add_argument("--output", type=Path, required=True, help="directory to create; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights in the file (default: float32, as trained)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="write the moving average of the weights, of a run with --ema_decay",
    )
    parser.add_argument(
        "--merge_lora",
        action="store_true",
        help="merge LoRA adapters into their base, and compare the merged policy with them",
    )
    parser.add_argument(
        "--base_path", default="", help="directory of the adapters' base policy, if it was moved"
    )
    parser.add_argument(
        "--max_token_difference",
        type=float,
        metavar="SHARE",
        help="share of action tokens in which the merged policy may differ (default: 0 in float32, 0.1 in "
        "bfloat16, 0.05 in float16)",
    )
    parser.add_argument(
        "--device", default="cpu", help="device for the comparison of a merged policy (default: cpu)"
    )
    parser.add_argument(
        "--merge_with",
        default="",
        metavar="POLICY",
        help="interpolate the weights with those of another policy, such as the teacher",
    )
    parser.add_argument(
        "--alpha",
        type=_share_or_auto,
        metavar="SHARE",
        help="share of --merge_with in the weights (default: 0.5); auto: the share with the lowest task loss "
        "among those whose loss on held-out anchors is at most --epsilon; without episodes, the "
        "smallest of them",
    )
    add = parser.add_argument_group("choice of --alpha=auto", argument_default=argparse.SUPPRESS).add_argument
    add("--alphas", type=float, nargs="+", metavar="SHARE", help="shares to try (default: 0 0.1 … 1)")
    add("--anchor_cache_dir", help="anchor cache of the old tasks (required)")
    add("--epsilon", type=float, help="largest loss on its held-out anchors (required)")
    add(
        "--epsilon_relative",
        action="store_true",
        help="--epsilon is in multiples of the teacher's own loss, as the cache records it",
    )
    add(
        "--retention_loss",
        choices=get_args(RetentionLossName),
        help="loss on anchors (default: token_ce); others need anchors with these targets",
    )
    add(
        "--dataset_repo_id",
        help="also measure the task loss on held-out episodes of the new task: those that the run held out "
        "of its own data set, or all of another one",
    )
    add("--dataset_root", help="its local directory; without it, LeRobot's cache and the hub are used")
    add("--max_eval_samples", type=int, help="largest number of anchors, and of frames (default: all)")
    args = parser.parse_args(arguments)
    search = {name: vars(args).pop(name) for name in _SEARCH_FLAGS if name in args}
    _check_search(args.alpha, search)

    # Imported here so that --help and errors in flags are fast.
    from craft_ds.export.alpha_search import AlphaSearch
    from craft_ds.export.export import export_checkpoint

    if search:
        args.alpha = AlphaSearch(**search)
    result = export_checkpoint(**vars(args))
    print(f"exported {args.checkpoint} to {args.output} ({args.dtype}): {result}")


def _share_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, or auto") from None


def _check_search(alpha: float | str | None, search: dict[str, Any]) -> None:
    """Check that the flags of a search are complete, or that there are none.

    Raises:
        UserError: Names the flag and what to do.
    """
    if alpha != "auto" and "alphas" not in search:
        if search:
            raise UserError(f"--{min(search)} applies only with --alpha=auto: add it, or remove the flag")
        return
    if alpha not in (None, "auto"):
        raise UserError(f"--alpha={alpha} and --alphas: give one share, or several to choose from")
    for name in ("anchor_cache_dir", "epsilon"):
        if name not in search:
            raise UserError(f"--alpha=auto chooses by the loss on held-out anchors: give --{name}")
