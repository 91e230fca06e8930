"""Run `craft-ds demo`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
