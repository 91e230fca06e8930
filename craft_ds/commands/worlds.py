"""`craft-ds worlds`: record demonstrations of an embedded world, or pretrain its teacher."""

import argparse
from collections.abc import Sequence
from importlib import import_module

ACTIONS = ("record", "pretrain")


def main(arguments: Sequence[str]) -> None:
    """Run `craft-ds worlds record …` or `craft-ds worlds pretrain …`."""
    parser = argparse.ArgumentParser(prog="craft-ds worlds", description=__doc__)
    parser.add_argument("action", choices=ACTIONS, help="each has a --help of its own")
    args = parser.parse_args(arguments[:1])
    import_module(f"craft_ds.commands.worlds_{args.action}").main(arguments[1:])
