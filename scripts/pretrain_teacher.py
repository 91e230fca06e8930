"""Run `craft-ds worlds pretrain`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["worlds", "pretrain", *sys.argv[1:]])
