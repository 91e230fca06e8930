"""Run `craft-ds plan`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
