"""Measure a policy in an embedded world: closed-loop success and the loss on held-out demonstrations.

    craft-ds eval --policy.path=outputs/run/final --world metaworld --output eval.json

Demonstrations are held out if `craft-ds worlds record` made them with another --seed than the training data.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from craft_ds.errors import UserError
from craft_ds.worlds.tasks import WORLDS

if TYPE_CHECKING:
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
    add("--world", choices=WORLDS, required=True)
    add("--tasks", choices=("all", "old", "new"), default="all", help="default: all")
    add("--episodes", type=int, default=20, help="episodes per task (default: 20)")
    add("--seed", type=int, default=1000, help="seed of the scenes (default: 1000)")
    add("--data_root", type=Path, help="held-out demonstrations: a directory of `craft-ds worlds record`")
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.episodes < 1:
        raise UserError(f"--episodes={args.episodes} must be at least 1")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)

    # Late: torch, LeRobot and the simulators take seconds to import; --help does not need them.
    from craft_ds.lora.weights import load_trained_policy
    from craft_ds.policies.loading import load_policy_config, load_processors
    from craft_ds.policies.pi0_fast.generation import action_chunk
    from craft_ds.worlds import make_world
    from craft_ds.worlds.demonstrations import read_recipe
    from craft_ds.worlds.evaluation import ClosedLoopPolicy, demonstration_loss, evaluate

    world = make_world(args.world)
    recipe = read_recipe(args.data_root) if args.data_root else None
    if args.data_root and (recipe is None or recipe.world != args.world):
        raise UserError(
            f"--data_root {args.data_root} holds no {args.world} demonstrations: "
            f"record them with `craft-ds worlds record --world {args.world}`"
        )
    config = load_policy_config(args.policy_path)
    policy = load_trained_policy(config, args.policy_path)
    preprocessor, postprocessor = load_processors(config, args.policy_path)

    tasks = world.tasks(args.tasks)
    closed_loop = ClosedLoopPolicy(partial(action_chunk, policy), preprocessor, postprocessor)
    success = evaluate(closed_loop, world, tasks, episodes=args.episodes, seed=args.seed)
    losses: dict[str, float] = {}
    if args.data_root:
        for split in ("old", "new") if args.tasks == "all" else (args.tasks,):
            losses |= demonstration_loss(policy, preprocessor, args.data_root / split)
    loss = {task: losses[world.task_text(task)] for task in tasks} if losses else {}

    print_table(world, success, loss)
    if args.output:
        result = {
            "policy": str(args.policy_path),
            "world": args.world,
            "episodes": args.episodes,
            "seed": args.seed,
            "success": success,
            "loss": loss,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_table(world: "World", success: dict[str, float], loss: dict[str, float]) -> None:
    print(f"{'task':28s} {'':4s} {'success':>7s} {'loss/token':>10s}")
    for task, share in success.items():
        kind = "old" if task in world.old_tasks else "new"
        print(f"{task:28s} {kind:4s} {share:7.2f} {f'{loss[task]:.3f}' if loss else '-':>10s}")
