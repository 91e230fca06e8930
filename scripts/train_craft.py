"""Run `craft-ds train`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
