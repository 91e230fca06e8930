"""`craft-ds export`: turn a checkpoint into a policy directory that stock LeRobot loads."""

import argparse
from collections.abc import Sequence
from pathlib import Path


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
    parser.add_argument("--alpha", type=float, help="share of --merge_with in the weights (default: 0.5)")
    args = parser.parse_args(arguments)

    # Imported here so that --help and errors in flags are fast.
    from craft_ds.export.export import export_checkpoint

    result = export_checkpoint(**vars(args))
    print(f"exported {args.checkpoint} to {args.output} ({args.dtype}): {result}")
