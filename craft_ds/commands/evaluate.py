"""Measure a policy: closed-loop success in an embedded world, and the loss on held-out demonstrations.

    craft-ds eval --policy.path=outputs/run/final --world metaworld --output eval.json
    craft-ds eval --policy.path=outputs/run/final --dataset.repo_id me/heldout --dataset.root data/heldout

Demonstrations are held out if `craft-ds worlds record` made them with another --seed than the training data.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_file
from craft_ds.worlds.tasks import WORLDS, tasks_of

if TYPE_CHECKING:
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import PolicyProcessorPipeline

    from craft_ds.worlds import World


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--policy.path",
        dest="policy_path",
        required=True,
        help="policy directory, with or without LoRA adapters, or hub id",
    )
    add("--world", choices=WORLDS, help="world to run the policy in")
    add("--tasks", nargs="+", help="all, old, new, or names of tasks (default: all)")
    add("--episodes", type=int, help="episodes per task (default: 20)")
    add("--seed", type=int, help="seed of the scenes (default: 1000)")
    add("--data_root", type=Path, help="held-out demonstrations: a directory of `craft-ds worlds record`")
    add(
        "--dataset.repo_id",
        dest="repo_ids",
        nargs="+",
        default=[],
        help="held-out LeRobot data sets to measure the loss on",
    )
    add(
        "--dataset.root",
        dest="roots",
        nargs="+",
        default=[],
        help="their local directories, one for each; without it, LeRobot's cache and the hub are used",
    )
    add("--device", default="cpu", help="device of the policy, such as cuda (default: cpu)")
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not args.world and not args.repo_ids:
        raise UserError("nothing to measure: give --world, or --dataset.repo_id")
    if args.roots and len(args.roots) != len(args.repo_ids):
        raise UserError("--dataset.root: give one directory for each --dataset.repo_id, or none")
    if not args.world:
        for name in ("data_root", "tasks", "episodes", "seed"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} has no effect without --world: add it, or omit --{name}")
        return args
    args.tasks = tasks_of(args.world, args.tasks or ["all"])
    args.episodes = 20 if args.episodes is None else args.episodes
    args.seed = 1000 if args.seed is None else args.seed
    if args.episodes < 1:
        raise UserError(f"--episodes={args.episodes} must be at least 1")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)

    # Late: torch, LeRobot and the simulators take seconds to import; --help does not need them.
    from craft_ds.lora.weights import load_trained_policy
    from craft_ds.policies.loading import load_policy_config, load_processors

    demonstrations = find_demonstrations(args) if args.data_root else []
    config = load_policy_config(args.policy_path)
    processors = load_processors(config, args.policy_path, args.device)
    policy = load_trained_policy(config, args.policy_path, device=args.device)
    data_sets = open_data_sets(args, config, processors[0])
    result: dict[str, Any] = {"policy": str(args.policy_path)}
    if args.world:
        result |= measure_in_world(args, demonstrations, policy, *processors)
    if args.repo_ids:
        result["datasets"] = measure_losses(args, data_sets, policy, processors[0])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def find_demonstrations(args: argparse.Namespace) -> list[Path]:
    """Return the data sets in `--data_root` that show one of the tasks.

    Raises:
        UserError: It holds no demonstrations of the world, or none of a task.
    """
    from craft_ds.worlds.demonstrations import data_sets_of, read_recipe

    recipe = read_recipe(args.data_root)
    if recipe is None or recipe.world != args.world:
        raise UserError(
            f"--data_root {args.data_root} holds no {args.world} demonstrations: "
            f"record them with `craft-ds worlds record --world {args.world}`"
        )
    shown = data_sets_of(recipe)
    for task in args.tasks:
        if not any(task in tasks for tasks in shown.values()):
            raise UserError(
                f"--data_root {args.data_root} holds no demonstrations of {task}: "
                f"record them with `craft-ds worlds record --world {args.world} --tasks {task}`"
            )
    return [args.data_root / name for name, tasks in shown.items() if not set(tasks).isdisjoint(args.tasks)]


def measure_in_world(
    args: argparse.Namespace,
    demonstrations: Sequence[Path],
    policy: "PreTrainedPolicy",
    preprocessor: "PolicyProcessorPipeline",
    postprocessor: "PolicyProcessorPipeline",
) -> dict[str, Any]:
    """Return success, and loss where demonstrations are given, by task; print both."""
    from craft_ds.policies.pi0_fast.generation import action_chunk
    from craft_ds.worlds import make_world
    from craft_ds.worlds.evaluation import ClosedLoopPolicy, demonstration_loss, evaluate

    world = make_world(args.world)
    closed_loop = ClosedLoopPolicy(partial(action_chunk, policy), preprocessor, postprocessor)
    success = evaluate(closed_loop, world, args.tasks, episodes=args.episodes, seed=args.seed)
    losses: dict[str, float] = {}
    for root in demonstrations:
        losses |= demonstration_loss(policy, preprocessor, root)
    loss = {task: losses[world.task_text(task)] for task in args.tasks} if losses else {}
    print_table(world, success, loss)
    return {
        "world": args.world,
        "episodes": args.episodes,
        "seed": args.seed,
        "success": success,
        "loss": loss,
    }


def open_data_sets(
    args: argparse.Namespace, config: "PreTrainedConfig", preprocessor: "PolicyProcessorPipeline"
) -> list["LeRobotDataset"]:
    """Open the data sets of `--dataset.repo_id`, all of them before anything is measured.

    Raises:
        UserError: One cannot be opened or does not fit the policy.
    """
    from craft_ds.data.lerobot_dataset import open_dataset

    roots = args.roots or [None] * len(args.repo_ids)
    return [
        open_dataset(repo_id, root, config, preprocessor)
        for repo_id, root in zip(args.repo_ids, roots, strict=True)
    ]


def measure_losses(
    args: argparse.Namespace,
    data_sets: Sequence["LeRobotDataset"],
    policy: "PreTrainedPolicy",
    preprocessor: "PolicyProcessorPipeline",
) -> list[dict[str, Any]]:
    """Return the mean loss per token on each data set, overall and by task; print it."""
    from craft_ds.worlds.evaluation import dataset_loss

    roots, measured = args.roots or [None] * len(args.repo_ids), []
    for repo_id, root, data_set in zip(args.repo_ids, roots, data_sets, strict=True):
        losses = dataset_loss(policy, preprocessor, data_set)
        totals, counts = zip(*losses.values(), strict=True)
        mean, by_task = sum(totals) / sum(counts), {text: total / n for text, (total, n) in losses.items()}
        measured.append({"repo_id": repo_id, "root": root, "loss": mean, "loss_by_task": by_task})
        print(f"{repo_id}: loss per token {mean:.4f}")
    return measured


def print_table(world: "World", success: dict[str, float], loss: dict[str, float]) -> None:
    print(f"{'task':28s} {'':4s} {'success':>7s} {'loss/token':>10s}")
    for task, share in success.items():
        kind = "old" if task in world.old_tasks else "new"
        print(f"{task:28s} {kind:4s} {share:7.2f} {f'{loss[task]:.3f}' if loss else '-':>10s}")
