"""`craft-ds export`: turn a checkpoint into a policy directory that stock LeRobot loads."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Export a checkpoint as the flags say."""
    parser = argparse.ArgumentParser(
        prog="craft-ds export",
        description="Export a checkpoint as a policy directory that stock LeRobot loads.",
    )
    parser.add_argument("checkpoint", type=Path, help="outputs/run/step_001000 or outputs/run/final")
    parser.add_argument("--output", type=Path, required=True, help="directory to make; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights in the file (default: float32, as trained)",
    )
    parser.add_argument(
        "--merge_lora",
        action="store_true",
        help="make a whole policy of LoRA adapters and their base, and compare it with them",
    )
    parser.add_argument(
        "--base_path", default="", help="where the adapters' base policy lies, if it was moved"
    )
    parser.add_argument(
        "--max_token_difference",
        type=float,
        metavar="SHARE",
        help="of action tokens that a merged policy may choose differently (default: 0 in float32, 0.1 in "
        "bfloat16, 0.05 in float16)",
    )
    parser.add_argument("--device", default="cpu", help="where a merged policy is compared (default: cpu)")
    args = parser.parse_args(arguments)

    from craft_ds.export.export import export_checkpoint

    said = export_checkpoint(**vars(args))
    print(f"exported {args.checkpoint} to {args.output} ({args.dtype}): {said}")
