"""Make the teacher of an embedded world from scratch: demonstrations, tokenizers, training, evaluation.

craft-ds worlds pretrain --world metaworld --output_dir outputs/teacher
craft-ds worlds pretrain --world cw10 --output_dir outputs/start
craft-ds worlds pretrain --world cw10 --split new --steps 9000 --output_dir outputs/joint
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_directory
from craft_ds.worlds import make_world
from craft_ds.worlds.recording import Recipe
from craft_ds.worlds.tasks import WORLDS

EVAL_SEED = 1000


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--world", choices=WORLDS, required=True)
    add("--output_dir", type=Path, required=True, help="policy directory to create")
    add("--data_dir", type=Path, help="demonstrations to record or reuse (default: outputs/world/WORLD)")
    add("--episodes_per_task", type=int, help="demonstrations of each task (default: by world)")
    add("--steps", type=int, help="optimizer steps (default: by world)")
    add(
        "--split",
        choices=("old", "new"),
        default="old",
        help="tasks to learn; new: all new tasks at once, the upper bound of learning them in turn "
        "(default: old)",
    )
    add("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add("--eval_episodes", type=int, default=20, help="episodes per task of the evaluation (default: 20)")
    add("--processes", type=int, default=2, help="processes that simulate and render (default: 2)")
    args = parser.parse_args(arguments)
    for name in ("episodes_per_task", "steps", "eval_episodes", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists: choose another, or remove it")
    return args


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)

    # Late: torch and LeRobot take seconds to import; --help does not need them.
    from craft_ds.worlds.demonstrations import write_demonstrations
    from craft_ds.worlds.pretraining import PLANS, pretrain

    world = make_world(args.world)
    data_dir = args.data_dir or Path("outputs") / "world" / args.world
    plan = PLANS[args.world]
    episodes, steps = args.episodes_per_task or plan.episodes_per_task, args.steps or plan.steps
    write_demonstrations(Recipe(args.world, episodes, drift=plan.drift), data_dir, args.processes)
    hidden = args.output_dir.with_name(f".{args.output_dir.name}.{os.getpid()}.tmp")
    with atomic_directory(args.output_dir, hidden) as temporary:
        started = time.perf_counter()
        pretrain(world, data_dir / args.split, temporary, steps=steps, seed=args.seed)
        record = {
            "command": f"craft-ds worlds pretrain --world {args.world} --split {args.split} --steps {steps} "
            f"--seed {args.seed} --episodes_per_task {episodes}",
            "old_tasks": world.old_tasks,
            "new_tasks": world.new_tasks,
            "training_minutes": round((time.perf_counter() - started) / 60, 1),
            **measure(args, temporary),
        }
        (temporary / "teacher.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for task, share in record["success"].items():
        print(f"{task:30s} {'old' if task in world.old_tasks else 'new'}  success {share:.2f}")


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Evaluate the policy as it was saved, with rounded weights, and return entries of `teacher.json`."""
    import torch

    from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
    from craft_ds.policies.pi0_fast.generation import action_chunk
    from craft_ds.worlds.evaluation import ClosedLoopPolicy, evaluate

    world = make_world(args.world)
    config = load_policy_config(directory)
    policy = load_policy(config, directory)
    closed_loop = ClosedLoopPolicy(partial(action_chunk, policy), *load_processors(config, directory))
    tasks = world.tasks("all")
    return {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "weights": "float16",
        "success": evaluate(closed_loop, world, tasks, episodes=args.eval_episodes, seed=EVAL_SEED),
        "success_measured": f"{args.eval_episodes} episodes per task, seed {EVAL_SEED}",
        "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores",
    }
