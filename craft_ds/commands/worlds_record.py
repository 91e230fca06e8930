"""Record demonstrations of an embedded world, or the episodes of a policy, as LeRobot data sets.

craft-ds worlds record --world metaworld --output_dir outputs/world
    the scripted expert's demonstrations: OUTPUT_DIR/old and OUTPUT_DIR/new

craft-ds worlds record --world cw10 --tasks hammer-v3 push-wall-v3 --drift 1.5 --output_dir outputs/cw10
    a data set for each task: OUTPUT_DIR/TASK

craft-ds worlds record --world metaworld --policy.path=path/to/teacher --output_dir outputs/rollouts
    the policy's own episodes of its tasks: OUTPUT_DIR, with which `craft-ds anchors` needs no old data
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.worlds.recording import Recipe
from craft_ds.worlds.tasks import WORLDS, tasks_of


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--world", choices=WORLDS, required=True)
    add("--output_dir", type=Path, required=True, help="directory to create, or to reuse if complete")
    add(
        "--episodes_per_task",
        type=int,
        default=Recipe.episodes_per_task,
        help=f"demonstrations, or scenes for the policy, of each task (default: {Recipe.episodes_per_task})",
    )
    add(
        "--seed",
        type=int,
        default=Recipe.seed,
        help=f"seed of scenes and noise (default: {Recipe.seed})",
    )
    add(
        "--tasks",
        nargs="+",
        help="names of tasks: one data set for each (default: one of the old and one of the new tasks); with "
        "--policy.path all, old, new or names (default: old)",
    )
    expert = parser.add_argument_group("the expert's demonstrations")
    add = expert.add_argument
    add("--processes", type=int, help="processes that simulate and render (default: 2)")
    add(
        "--noise",
        type=float,
        help="standard deviation of the noise on executed actions, as a share of half the action range "
        f"(default: {Recipe.noise})",
    )
    add(
        "--drift",
        type=float,
        help="largest random push off the expert's path, in the same unit; shows how to recover "
        f"(default: {Recipe.drift:g}: none)",
    )
    policy = parser.add_argument_group("the policy's own episodes")
    add = policy.add_argument
    add("--policy.path", dest="policy_path", help="policy directory or hub id")
    add("--keep_failures", action="store_true", help="also record episodes that do not solve their scene")
    add("--device", help="device of the policy (default: cpu)")
    args = parser.parse_args(arguments)
    for name in ("noise", "drift"):
        if (value := getattr(args, name)) is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name}={value} must be a number of at least 0")
    for name in ("episodes_per_task", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    unused = ("processes", "noise", "drift") if args.policy_path else ("keep_failures", "device")
    for name in unused:
        value = getattr(args, name)
        if value is not None and value is not False:
            fix = "with --policy.path: omit it" if args.policy_path else "without --policy.path: add that"
            raise UserError(f"--{name} has no effect {fix}")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    if args.policy_path:
        record_policy(args)
        return

    from craft_ds.worlds.demonstrations import write_demonstrations  # late: LeRobot takes seconds to import

    recipe = Recipe(
        args.world,
        args.episodes_per_task,
        args.seed,
        tasks=tuple(args.tasks or ()),
        noise=Recipe.noise if args.noise is None else args.noise,
        drift=Recipe.drift if args.drift is None else args.drift,
    )
    for path in write_demonstrations(recipe, args.output_dir, args.processes or 2):
        print(path)


def record_policy(args: argparse.Namespace) -> None:
    """Record the policy's own episodes, and print how many scenes it solved."""
    tasks = tasks_of(args.world, args.tasks or ["old"])
    if args.output_dir.exists():
        raise UserError(f"--output_dir={args.output_dir} exists already: choose another or move it away")

    # Late: torch, LeRobot and the simulators take seconds to import.
    from craft_ds.lora.weights import load_trained_policy
    from craft_ds.policies.loading import load_policy_config, load_processors, resolve_policy_path
    from craft_ds.policies.pi0_fast.generation import action_chunk
    from craft_ds.worlds import make_world
    from craft_ds.worlds.evaluation import ClosedLoopPolicy
    from craft_ds.worlds.rollouts import write_rollouts

    world, device = make_world(args.world), args.device or "cpu"
    directory = resolve_policy_path(args.policy_path)
    config = load_policy_config(directory)
    policy = load_trained_policy(config, directory, device=device)
    processors = load_processors(config, directory, device=device)
    solved = write_rollouts(
        ClosedLoopPolicy(partial(action_chunk, policy), *processors),
        world,
        tasks,
        args.output_dir,
        scenes=args.episodes_per_task,
        seed=args.seed,
        name=args.policy_path,
        keep_failures=args.keep_failures,
    )
    for task, count in solved.items():
        print(f"{task}: {count} of {args.episodes_per_task} scenes solved")
    print(args.output_dir)
