"""Run `craft-ds worlds record`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["worlds", "record", *sys.argv[1:]])
