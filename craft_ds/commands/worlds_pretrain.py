"""Make the teacher of an embedded world from nothing: demonstrations, tokenizers, training, evaluation.

python scripts/pretrain_teacher.py --world metaworld --output_dir outputs/teacher
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.worlds import WORLDS, make_world
from craft_ds.worlds.demonstrations import Recipe, write_demonstrations
from craft_ds.worlds.evaluation import evaluate
from craft_ds.worlds.pretraining import PLANS, pretrain


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds worlds pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="the policy directory to make")
    parser.add_argument("--data_dir", type=Path, help="demonstrations to make or reuse [outputs/world/WORLD]")
    parser.add_argument("--episodes_per_task", type=int, help="demonstrations [the world's plan]")
    parser.add_argument("--steps", type=int, help="optimizer steps [the world's plan]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and batches")
    parser.add_argument("--eval_episodes", type=int, default=20, help="episodes a task at the end")
    parser.add_argument("--processes", type=int, default=2, help="processes that simulate and render")
    args = parser.parse_args(arguments)
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists: name another or remove it")

    world = make_world(args.world)
    data_dir = args.data_dir or Path("outputs") / "world" / args.world
    plan = PLANS[args.world]
    episodes, steps = args.episodes_per_task or plan.episodes_per_task, args.steps or plan.steps
    old, _ = write_demonstrations(Recipe(args.world, episodes), data_dir, args.processes)

    making = args.output_dir.with_name(f".{args.output_dir.name}.{os.getpid()}.tmp")
    try:
        started = time.perf_counter()
        pretrain(world, old, making, steps=steps, seed=args.seed)
        minutes = (time.perf_counter() - started) / 60

        # What is measured is what lies on the disk: the rounded weights and the saved processors.
        config = load_policy_config(making)
        policy, processors = load_policy(config, making), load_processors(config, making)
        act = partial(action_chunk, policy)
        success = evaluate(act, *processors, world, world.tasks("all"), args.eval_episodes, seed=1000)
        record = {
            "command": f"python scripts/pretrain_teacher.py --world {args.world} --steps {steps} "
            f"--seed {args.seed} --episodes_per_task {episodes}",
            "old_tasks": world.old_tasks,
            "new_tasks": world.new_tasks,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "weights": "float16",
            "success": success,
            "success_measured": f"{args.eval_episodes} episodes a task, seed 1000",
            "training_minutes": round(minutes, 1),
            "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores",
        }
        (making / "teacher.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        making.rename(args.output_dir)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    for task, share in success.items():
        print(f"{task:30s} {'old' if task in world.old_tasks else 'new'}  success {share:.2f}")
