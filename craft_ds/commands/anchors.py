"""Build an anchor cache: samples of the old tasks, as the teacher policy's own processors see them."""

import argparse
import os
from collections.abc import Sequence


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds anchors",
        description=__doc__,
        epilog="An interrupted build is continued by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_repo_id", required=True, help="LeRobot data set of the old tasks")
    add("--dataset_root", help="its local folder; without it, LeRobot's cache and the hub are asked")
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument(
        "--policy_repo_id", "--policy_path", dest="policy_path", help="the teacher: a policy folder or hub id"
    )
    add("--output_dir", required=True, help="directory of the cache; must not exist")
    add("--num_samples", type=int, default=1000, help="number of anchors")
    add("--batch_size", type=int, default=16, help="anchors processed at once")
    add("--num_workers", type=int, default=4, help="processes that read the data set")
    add(
        "--heldout_fraction",
        type=float,
        default=0.2,
        help="part of each task's episodes whose anchors are kept for measuring",
    )
    add("--seed", type=int, default=0, help="seed of the draw")
    add("--device", default="cpu", help="where the teacher computes its own loss, such as cuda")
    add("--shard_size", type=int, default=256, help="anchors a file")
    add(
        "--image_size",
        choices=("dataset", "model"),
        default="dataset",
        help="store images as recorded (exact), or as the policy resizes them (8-bit rounding)",
    )
    add(
        "--vision_features",
        action="store_true",
        help="also store what the teacher's vision tower makes of the images (fp16), for training with that "
        "tower frozen and --craft.vision_features=true",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    # The teacher's threads spin while they wait: on cores that the workers need, that costs half the speed.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - args.num_workers)))
    # After the arguments, so that --help and a misspelt flag answer at once.
    from craft_ds.anchors.build import BuildOptions, build_anchor_cache
    from craft_ds.anchors.cache import AnchorCache

    built = build_anchor_cache(BuildOptions(**vars(args)))
    cache = AnchorCache.open(args.output_dir, verify=not built)
    counts = " and ".join(f"{len(cache.splits[split])} {split}" for split in cache.splits)
    loss = cache.teacher_loss["all"]["overall"]
    print(
        f"{'built' if built else 'already built'}: {args.output_dir} ({counts} anchors of "
        f"{len(cache.tasks)} tasks, teacher loss {loss:.4f} a token)"
    )
