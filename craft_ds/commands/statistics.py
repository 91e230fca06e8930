"""`craft-ds statistics`: write a policy whose normalisers have the statistics of data sets."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from craft_ds.config.arguments import parse_rename_map
from craft_ds.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Write the policy that the flags describe."""
    parser = argparse.ArgumentParser(
        prog="craft-ds statistics",
        description="Write a copy of a policy whose normalisers have the statistics of one or several data "
        "sets, such as those of the old tasks and of the new one together. Meant for base policies, which "
        "have none.",
    )
    add = parser.add_argument
    add("--policy_path", required=True, help="policy directory or hub id")
    add("--dataset_repo_id", action="append", required=True, help="data set; repeat the flag for more")
    add("--dataset_root", action="append", default=[], help="its local folder; as often as --dataset_repo_id")
    add("--output_dir", type=Path, required=True, help="directory to create; must not exist")
    add("--rename_map", default="{}", help="JSON mapping from names in the data sets to those in the policy")
    add("--replace", action="store_true", help="replace statistics that the policy already has")
    args = parser.parse_args(arguments)
    roots = args.dataset_root or [None] * len(args.dataset_repo_id)
    if len(roots) != len(args.dataset_repo_id):
        raise UserError(
            f"--dataset_root is given {len(roots)} times and --dataset_repo_id {len(args.dataset_repo_id)} "
            "times: give both for each data set"
        )
    rename_map = parse_rename_map(args.rename_map)

    # Imported here so that --help and errors in flags are fast.
    from craft_ds.data.policy_statistics import write_policy_with_statistics

    datasets = list(zip(args.dataset_repo_id, roots, strict=True))
    result = write_policy_with_statistics(
        args.policy_path, datasets, args.output_dir, rename_map=rename_map, replace=args.replace
    )
    print(f"wrote {args.output_dir}: {args.policy_path} with the {result}")
