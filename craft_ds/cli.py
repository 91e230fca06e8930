"""What the thin scripts share: errors become one line and a status, once a node."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from craft_ds.distributed import is_node_main
from craft_ds.errors import UserError


def run_main(action: Callable[[], object]) -> None:
    """Run a command; bad input ends it with `error: …` on stderr and status 2, without a traceback."""
    # LeRobot logs several screens of loader tracebacks where FFmpeg is absent, then decodes with PyAV.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    try:
        action()
    except UserError as error:
        if is_node_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def train_main() -> None:
    """`scripts/train_craft.py`."""

    def action() -> None:
        # Imported here, inside what turns errors into one line: LeRobot and torch take seconds.
        from craft_ds.train_config import parse_arguments
        from craft_ds.trainer import train_craft

        train_craft(parse_arguments(sys.argv[1:]))

    run_main(action)


def export_main() -> None:
    """`scripts/export_checkpoint.py`."""
    parser = argparse.ArgumentParser(
        prog="export_checkpoint.py",
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
    arguments = parser.parse_args()

    def action() -> None:
        from craft_ds.export import export_checkpoint

        export_checkpoint(arguments.checkpoint, arguments.output, arguments.dtype)
        print(f"exported {arguments.checkpoint} to {arguments.output} ({arguments.dtype})")

    run_main(action)
