"""`craft-ds version`: print the version of craft-ds and of the packages that it was tested with."""

import argparse
from collections.abc import Sequence

import craft_ds
from craft_ds.config.versions import installed_versions


def main(arguments: Sequence[str]) -> None:
    """Print one line per package."""
    argparse.ArgumentParser(prog="craft-ds version", description=__doc__, allow_abbrev=False).parse_args(
        arguments
    )
    print(f"craft-ds {craft_ds.__version__}")
    for entry in installed_versions():
        print(entry)
