"""What the thin scripts share: errors become one line, once a node, and a status on every rank."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from craft_ds.distributed.env import is_local_rank0, launched_rank
from craft_ds.errors import LOST_RANK_STATUS, Preempted, RankLost, TrainingDiverged, UserError

PREEMPTED_STATUS = 75


def run_main(action: Callable[[], object]) -> None:
    """Run a command. What the user can mend, or did, ends it with one line on stderr and no traceback.

    Status 2: bad input, or an output that cannot be written; 1: training diverged; 69: another rank failed,
    died or hangs; 75 (`EX_TEMPFAIL`): the run was asked to leave and has saved, to be started again; 130:
    interrupted from the keyboard.
    """
    # LeRobot logs several screens of loader tracebacks where FFmpeg is absent, then decodes with PyAV.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    try:
        action()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except TrainingDiverged as error:
        _exit(f"error: {error}", 1)
    except Preempted as notice:
        _exit(str(notice), PREEMPTED_STATUS)
    except RankLost as error:
        _exit(f"error: {error}", LOST_RANK_STATUS, speaks=error.speaks)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(line: str, status: int, *, speaks: bool | None = None) -> NoReturn:
    if is_local_rank0() if speaks is None else speaks:
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def train_main() -> None:
    """`scripts/train_craft.py`."""

    def action() -> None:
        # Imported here, inside what turns errors into one line: LeRobot and torch take seconds.
        from craft_ds.checkpoints.run_directory import repair_last_link
        from craft_ds.config.parser import normalise_arguments, parse_arguments
        from craft_ds.distributed.collectives import destroy_process_group, process_group_is_initialized
        from craft_ds.training.resume import choose_checkpoint
        from craft_ds.training.trainer import train_craft

        formed_by_caller = process_group_is_initialized()
        chosen = choose_checkpoint(normalise_arguments(sys.argv[1:]))
        for line in chosen.said if is_local_rank0() else ():
            print(line, flush=True)
        config = parse_arguments(chosen.arguments)
        config.verified_checkpoint = chosen.checkpoint
        if chosen.checkpoint is not None and chosen.is_finished(config.steps):
            if launched_rank() == 0:
                repair_last_link(chosen.checkpoint)
                print(
                    f"{chosen.checkpoint} has done all of --steps={config.steps}: there is nothing left to do"
                )
        else:
            train_craft(config)
        if not formed_by_caller:
            destroy_process_group()

    run_main(action)


def exit_without_teardown(command: Callable[[], None]) -> NoReturn:
    """Run a command and end the process with its status, without the interpreter's own leave-taking.

    Everything is written and closed by then. Threads of gloo and of the autograd engine still hold tensors;
    where one lets go of them while the interpreter is being taken down, it aborts the process, and a launcher
    would report a finished run as failed.
    """
    status: Any = 0
    try:
        command()
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else bool(status))


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
    arguments = parser.parse_args()

    def action() -> None:
        from craft_ds.export.export import export_checkpoint

        said = export_checkpoint(**vars(arguments))
        print(f"exported {arguments.checkpoint} to {arguments.output} ({arguments.dtype}): {said}")

    run_main(action)
