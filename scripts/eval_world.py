"""Run `craft-ds eval`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
