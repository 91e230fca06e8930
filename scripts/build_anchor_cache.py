"""Run `craft-ds anchors`."""

import sys

from craft_ds.cli import main

if __name__ == "__main__":
    main(["anchors", *sys.argv[1:]])
