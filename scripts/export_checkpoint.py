"""Run `craft-ds export`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
