"""Record demonstrations of an embedded world as LeRobot data sets.

craft-ds worlds record --world metaworld --output_dir outputs/world     OUTPUT_DIR/old and OUTPUT_DIR/new
craft-ds worlds record --world cw10 --tasks hammer-v3 push-wall-v3 --drift 1.5 --output_dir outputs/cw10
                                                                        OUTPUT_DIR/TASK for each task
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.worlds.recording import Recipe
from craft_ds.worlds.tasks import WORLDS


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--world", choices=WORLDS, required=True)
    add("--output_dir", type=Path, required=True, help="directory to create, or to reuse if complete")
    add(
        "--episodes_per_task",
        type=int,
        default=Recipe.episodes_per_task,
        help=f"demonstrations of each task (default: {Recipe.episodes_per_task})",
    )
    add(
        "--seed",
        type=int,
        default=Recipe.seed,
        help=f"seed of scenes and noise (default: {Recipe.seed})",
    )
    add("--processes", type=int, default=2, help="processes that simulate and render (default: 2)")
    add("--tasks", nargs="+", default=[], help="one data set for each of these tasks (default: old and new)")
    add(
        "--noise",
        type=float,
        default=Recipe.noise,
        help="standard deviation of the noise on executed actions, as a share of half the action range "
        f"(default: {Recipe.noise})",
    )
    add(
        "--drift",
        type=float,
        default=Recipe.drift,
        help="largest random push off the expert's path, in the same unit; shows how to recover "
        f"(default: {Recipe.drift:g}: none)",
    )
    args = parser.parse_args(arguments)
    for name in ("noise", "drift"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name}={getattr(args, name)} must be a number of at least 0")
    for name in ("episodes_per_task", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")

    from craft_ds.worlds.demonstrations import write_demonstrations  # late: LeRobot takes seconds to import

    recipe = Recipe(
        args.world,
        args.episodes_per_task,
        args.seed,
        tasks=tuple(args.tasks),
        noise=args.noise,
        drift=args.drift,
    )
    for path in write_demonstrations(recipe, args.output_dir, args.processes):
        print(path)
