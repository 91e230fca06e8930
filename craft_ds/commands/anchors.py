"""Build an anchor cache: samples of the old tasks, preprocessed by the teacher policy's own processors."""

import argparse
import os
from collections.abc import Sequence

from craft_ds.config.arguments import parse_rename_map
from craft_ds.errors import exits_as_user_error


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="craft-ds anchors",
        description=__doc__,
        epilog="Run the same command again to resume an interrupted build.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_repo_id", required=True, help="LeRobot data set of the old tasks")
    add("--dataset_root", help="its local directory; without it, LeRobot's cache and the hub are used")
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument(
        "--policy_repo_id",
        "--policy_path",
        dest="policy_path",
        help="the teacher: a policy directory or hub id",
    )
    add("--output_dir", required=True, help="directory of the cache; must not exist")
    add(
        "--extend",
        metavar="CACHE",
        help="anchor cache to extend by the new tasks: --output_dir then holds its anchors and the new ones",
    )
    add("--num_samples", type=int, default=1000, help="number of anchors")
    add("--batch_size", type=int, default=16, help="anchors per batch of the teacher")
    add("--num_workers", type=int, default=4, help="processes that load the data set")
    add(
        "--heldout_fraction",
        type=float,
        default=0.2,
        help="share of each task's episodes whose anchors are held out to measure the constraint",
    )
    add("--seed", type=int, default=0, help="seed of the random selection")
    add("--device", default="cpu", help="device on which the teacher's own loss is computed, such as cuda")
    add("--shard_size", type=int, default=256, help="anchors per file")
    add(
        "--image_size",
        choices=("dataset", "model"),
        default="dataset",
        help="store images as recorded (exact) or resized by the policy (rounded to 8 bits)",
    )
    add(
        "--vision_features",
        action="store_true",
        help="also store the features of the teacher's vision tower (fp16), for training with that tower "
        "frozen and --craft.vision_features=true",
    )
    add(
        "--targets",
        nargs="+",
        choices=("teacher_tokens", "teacher_kl", "hidden"),
        help="also store the teacher's own outputs, for --craft.retention_loss of the same name",
    )
    add(
        "--selection",
        choices=("uniform", "phases"),
        default="uniform",
        help="draw the frames of a task evenly over its episodes, or also evenly over its motion phases, "
        "which begin where a gripper moves or the speed changes",
    )
    add(
        "--gripper",
        nargs="+",
        metavar="NAME",
        help="for --selection=phases: names or indices of the action's dimensions that move grippers, or "
        'none (default: those whose name contains "grip", else the last)',
    )
    add(
        "--instructions",
        nargs="+",
        metavar="TEXT",
        help="old tasks without data: take only observations from the data set, such as that of the new "
        "task, and the teacher's own greedy actions under each of these instructions",
    )
    add(
        "--rename_map",
        default="{}",
        help="names of observations in the data set, mapped to the policy's, as JSON: "
        '{"observation.images.front": "observation.images.top"}; replaces the map of the teacher\'s own '
        "preprocessor",
    )
    add(
        "--allow_missing_cameras",
        nargs="?",
        const=True,
        default=False,
        type=_bool,
        metavar="true",
        help="accept a data set that lacks cameras of the policy: the policy masks them",
    )
    with exits_as_user_error():
        return parser.parse_args(arguments)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def main(arguments: Sequence[str]) -> None:
    """Build the anchor cache that the flags describe."""
    args = parse_arguments(arguments)
    # The teacher's threads spin while they wait: on cores that the workers need, this halves the speed.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - args.num_workers)))
    # Imported here so that --help and errors in flags are fast.
    from craft_ds.anchors.build import BuildOptions, build_anchor_cache
    from craft_ds.anchors.cache_list import open_caches
    from craft_ds.anchors.coverage import coverage_table, coverage_warnings
    from craft_ds.anchors.extend import extend_anchor_cache

    texts = {name: tuple(getattr(args, name, ())) for name in ("gripper", "instructions")}
    rename_map = parse_rename_map(args.rename_map) or None
    flags = vars(args) | texts | {"rename_map": rename_map}
    old = flags.pop("extend", None)
    options = BuildOptions(**flags)
    built = extend_anchor_cache(options, old) if old is not None else build_anchor_cache(options)
    cache = open_caches([args.output_dir], verify=not built)
    counts = " and ".join(f"{len(cache.splits[split])} {split}" for split in cache.splits)
    loss = cache.teacher_loss["all"]["overall"]
    print(
        f"{'built' if built else 'already built'}: {args.output_dir} ({counts} anchors of "
        f"{len(cache.tasks)} tasks, teacher loss {loss:.4f} per token)"
    )
    newest = cache.parts[-1]
    for name in newest.targets:
        print(f"targets {name}: teacher loss {newest.targets[name]['all']['overall']:.4g}")
    for line in [*coverage_table(cache), *coverage_warnings(cache, "heldout")]:
        print(line)
    dataset = newest.metadata["dataset"]
    if "observed_tasks" in dataset:
        print(f"actions: the teacher's own, for observations of {dataset['repo_id']}")
    if phases := dataset.get("phases"):
        print(f"motion phases (gripper: {', '.join(phases['gripper']) or 'none'}), anchors of each:")
        for text, counts in zip(newest.tasks, phases["anchors"], strict=True):
            print(f"  {text[:60]!r}: {' '.join(map(str, counts))}")
    if missing := newest.metadata.get("missing_cameras"):
        print(f"masked cameras, which the data set lacks: {', '.join(missing)}")
