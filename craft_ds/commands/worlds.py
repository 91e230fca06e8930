"""List the embedded worlds, record their demonstrations, or pretrain their teachers.

craft-ds worlds                 list the worlds and their tasks
craft-ds worlds record ...      write demonstrations as LeRobot data sets
craft-ds worlds pretrain ...    make a teacher from scratch
"""

import argparse
from collections.abc import Sequence
from importlib import import_module

from craft_ds.worlds.tasks import TASKS

ACTIONS = ("record", "pretrain")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS, nargs="?", help="each has its own --help")
    action = parser.parse_args(arguments[:1]).action
    if action is None:
        print_worlds()
    else:
        import_module(f"craft_ds.commands.worlds_{action}").main(arguments[1:])


def print_worlds() -> None:
    for world, tasks in TASKS.items():
        print(world)
        print(f"  old tasks: {', '.join(tasks.old)}")
        print(f"  new tasks: {', '.join(tasks.new)}")
