"""What the thin scripts share: errors become one line and a status, once a node."""

import sys
from collections.abc import Callable

from craft_ds.distributed import is_node_main
from craft_ds.errors import UserError


def run_main(action: Callable[[], object]) -> None:
    """Run a command; bad input ends it with `error: …` on stderr and status 2, without a traceback."""
    try:
        action()
    except UserError as error:
        if is_node_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def train_main() -> None:
    """`scripts/train_craft.py`."""

    def action() -> None:
        from craft_ds.train_config import parse_arguments
        from craft_ds.trainer import train_craft

        train_craft(parse_arguments(sys.argv[1:]))

    run_main(action)
