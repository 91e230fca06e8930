"""Write the demonstrations of an embedded world as LeRobot data sets: OUTPUT_DIR/old and OUTPUT_DIR/new.

python scripts/make_world.py --world metaworld --output_dir outputs/world
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.worlds import WORLDS
from craft_ds.worlds.demonstrations import Recipe, write_demonstrations


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--episodes_per_task", type=int, default=Recipe.episodes_per_task)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--processes", type=int, default=2, help="processes that simulate and render")
    args = parser.parse_args(arguments)
    if args.episodes_per_task < 1 or args.processes < 1:
        raise UserError("--episodes_per_task and --processes must be at least 1")
    recipe = Recipe(args.world, args.episodes_per_task, args.seed)
    for path in write_demonstrations(recipe, args.output_dir, args.processes):
        print(path)
