"""Measure a policy in an embedded world: closed-loop success and, on held-out demonstrations, its loss.

    python scripts/eval_world.py --policy.path=outputs/run/final --world metaworld --output eval.json

Demonstrations are held out when scripts/make_world.py made them with another --seed than the training data.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.worlds import WORLDS, make_world
from craft_ds.worlds.base import World
from craft_ds.worlds.demonstrations import read_recipe
from craft_ds.worlds.evaluation import demonstration_loss, evaluate


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy.path", dest="policy_path", required=True, help="a policy directory")
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--tasks", choices=("all", "old", "new"), default="all")
    parser.add_argument("--episodes", type=int, default=20, help="episodes a task")
    parser.add_argument("--seed", type=int, default=1000, help="of the scenes")
    parser.add_argument(
        "--data_root", type=Path, help="held-out demonstrations: a directory of make_world.py"
    )
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    args = parser.parse_args(arguments)
    if args.episodes < 1:
        raise UserError("--episodes must be at least 1")

    world = make_world(args.world)
    recipe = read_recipe(args.data_root) if args.data_root else None
    if args.data_root and (recipe is None or recipe.world != args.world):
        raise UserError(f"--data_root {args.data_root} holds no {args.world} demonstrations of make_world.py")
    config = load_policy_config(args.policy_path)
    policy, processors = (
        load_trained_policy(config, args.policy_path),
        load_processors(config, args.policy_path),
    )

    tasks = world.tasks(args.tasks)
    act = partial(action_chunk, policy)
    success = evaluate(act, *processors, world, tasks, args.episodes, args.seed)
    losses: dict[str, float] = {}
    if args.data_root:
        parts = ("old", "new") if args.tasks == "all" else (args.tasks,)
        for part in parts:
            losses |= demonstration_loss(policy, processors[0], args.data_root / part)
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


def print_table(world: World, success: dict[str, float], loss: dict[str, float]) -> None:
    print(f"{'task':28s} {'':4s} {'success':>7s} {'loss/token':>10s}")
    for task, share in success.items():
        kind = "old" if task in world.old_tasks else "new"
        print(f"{task:28s} {kind:4s} {share:7.2f} {f'{loss[task]:.3f}' if loss else '-':>10s}")
