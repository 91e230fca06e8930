"""The demo: teacher, plain fine-tuning and CRaFT on a new robot task, measured on old and new tasks.

It makes demonstrations, builds the anchor cache, fine-tunes the shipped teacher twice a seed on several ranks
of ZeRO-3 or FSDP2 (once as the plain baseline, once with CRaFT, same steps, same samples), runs all policies
in the simulator and ends with a table, a picture and outputs/demo/summary.json. With --lora it trains LoRA
adapters besides, again with and without CRaFT.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_ds.training.plots import plot_demo
from craft_ds.worlds import gl_problem, make_world

ROOT = Path(__file__).resolve().parents[2]
TEACHERS = ROOT / "craft_ds" / "worlds" / "assets"
TRAINING_FLAGS = [
    "--policy.optimizer_lr=5e-4",
    "--policy.scheduler_warmup_steps=0",
    "--num_workers=0",
    "--log_freq=20",
    "--save_freq=0",
]
CRAFT_FLAGS = [
    "--craft.enabled=true",
    "--craft.retention_freq=1",
    "--craft.epsilon_relative=true",
    "--craft.epsilon_start=1.6",
    "--craft.epsilon_end=1.4",
    "--craft.lambda_lr=0.1",
]
LORA_FLAGS = ["--lora=preset", "--policy.optimizer_lr=3e-3"]
METHODS = ("teacher", "baseline", "craft", "lora_baseline", "lora_craft")
ENGINES = {"zero3": "ZeRO-3", "fsdp": "FSDP2"}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--world",
        choices=("auto", "metaworld", "blocks"),
        default="auto",
        help="auto: metaworld where GL works",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of fine-tuning (default: 0)")
    add("--steps", type=int, default=400, help="optimizer steps of each fine-tuning (default: 400)")
    add(
        "--engine",
        choices=tuple(ENGINES),
        default="zero3",
        help="DeepSpeed ZeRO-3, started by deepspeed, or FSDP2, started by torchrun (default: zero3)",
    )
    add("--lora", action="store_true", help="train LoRA adapters too, with and without CRaFT")
    add("--ranks", type=int, default=2, help="ranks that share the policy (default: 2)")
    add("--batch_size", type=int, default=16, help="samples a step over all ranks (default: 16)")
    add("--num_anchors", type=int, default=1000, help="anchors of the old tasks (default: 1000)")
    add("--episodes", type=int, default=20, help="simulator episodes a task (default: 20)")
    add("--output_dir", type=Path, default=Path("outputs/demo"))
    add(
        "craft_flags",
        nargs="*",
        help="after --: further flags for the CRaFT runs, such as --craft.lambda_lr=1",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    began = time.monotonic()
    world_name = choose_world(args.world)
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    teacher = TEACHERS / f"{world_name}_teacher"

    data = output / f"{world_name}_data"
    say(f"demonstrations in {data}")
    script("make_world.py", "--world", world_name, "--output_dir", data)
    heldout = output / f"{world_name}_heldout"
    script(
        "make_world.py", "--world", world_name, "--output_dir", heldout, "--episodes_per_task", 5, "--seed", 7
    )

    cache = output / f"{world_name}_anchors"
    say(f"anchor cache in {cache}")
    script(
        "build_anchor_cache.py",
        f"--dataset_repo_id=craft-ds/{world_name}-old",
        f"--dataset_root={data / 'old'}",
        f"--policy_path={teacher}",
        f"--output_dir={cache}",
        f"--num_samples={args.num_anchors}",
        "--num_workers=0",
    )

    runs = output / f"{world_name}_runs"
    shutil.rmtree(runs, ignore_errors=True)
    rows = []
    for seed in args.seeds:
        jobs = {"teacher": teacher} if seed == args.seeds[0] else {}
        figures: dict[str, Any] = {"teacher": {"peak_memory_mb": None, "step_seconds": None}}
        for method, flags in methods(cache, args).items():
            say(f"{method}, seed {seed}: {args.steps} steps on {args.ranks} {ENGINES[args.engine]} ranks")
            run = runs / f"{method}_seed{seed}"
            train(args, world_name, teacher, data / "new", run, seed, flags)
            jobs[method] = run / "final"
            figures[method] = run_figures(run)
        say(f"closed-loop evaluation, {args.episodes} episodes a task: {', '.join(jobs)}")
        for method, result in evaluate(
            jobs, world_name, heldout, args.episodes, runs / f"seed{seed}"
        ).items():
            rows.append({"method": method, "seed": seed, **result, **figures[method]})

    world = make_world(world_name)
    summary = {
        "world": world_name,
        "engine": args.engine,
        "old_tasks": list(world.old_tasks),
        "new_tasks": list(world.new_tasks),
        "steps": args.steps,
        "episodes": args.episodes,
        "ranks": args.ranks,
        "craft_flags": craft_flags(cache, args),
        "lora_flags": LORA_FLAGS if args.lora else None,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "rows": rows,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_demo(summary, output / "summary.png")
    print_table(summary)
    minutes = (time.monotonic() - began) / 60
    say(f"done in {minutes:.1f} minutes: {output / 'summary.json'}, {output / 'summary.png'}")


def choose_world(name: str) -> str:
    """Meta-World where it can render; else say what is missing and take the blocks."""
    if name != "auto":
        return name
    problem = gl_problem()
    if problem is None:
        return "metaworld"
    say(problem)
    say("going on with the world of coloured blocks, which needs no GL")
    return "blocks"


def methods(cache: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The further flags of each kind of fine-tuning."""
    kinds: dict[str, list[str]] = {"baseline": [], "craft": craft_flags(cache, args)}
    if args.lora:
        kinds |= {f"lora_{method}": [*LORA_FLAGS, *flags] for method, flags in kinds.items()}
    return kinds


def craft_flags(cache: Path, args: argparse.Namespace) -> list[str]:
    anchors = max(1, args.batch_size // args.ranks)
    return [
        *CRAFT_FLAGS,
        f"--craft.anchor_cache_dir={cache}",
        f"--craft.anchor_batch_size={anchors}",
        *args.craft_flags,
    ]


def train(
    args: argparse.Namespace, world: str, teacher: Path, data: Path, run: Path, seed: int, flags: list[str]
) -> None:
    call(
        [
            *launcher(args),
            f"--policy.path={teacher}",
            f"--dataset.repo_id=craft-ds/{world}-new",
            f"--dataset.root={data}",
            f"--output_dir={run}",
            f"--steps={args.steps}",
            f"--seed={seed}",
            f"--batch_size={max(1, args.batch_size // args.ranks)}",
            *TRAINING_FLAGS,
            *flags,
        ]
    )


def launcher(args: argparse.Namespace) -> list[str]:
    """The command that starts the training script on all ranks, with what its engine needs."""
    if args.engine == "fsdp":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={args.ranks}", "scripts/train_craft.py", "--engine=fsdp"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        f"--num_gpus={args.ranks}",
        f"--master_port={port}",
        "scripts/train_craft.py",
        "--ds_config=ds_configs/zero3.json",
    ]


def run_figures(run: Path) -> dict[str, float]:
    """Median seconds a step and peak memory of a rank, as the run itself logged them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "peak_memory_mb": max(row["memory/peak_mb"] for row in rows if "memory/peak_mb" in row),
        "step_seconds": statistics.median(row["time/step_s"] for row in rows if "time/step_s" in row),
    }


def evaluate(
    policies: dict[str, Path], world: str, heldout: Path, episodes: int, output: Path
) -> dict[str, dict[str, Any]]:
    """Success and loss by task of each policy; the policies run side by side."""
    processes = {}
    for method, policy in policies.items():
        command = [sys.executable, "scripts/eval_world.py", f"--policy.path={policy}", "--world", world]
        command += ["--episodes", str(episodes), "--data_root", str(heldout)]
        command += ["--output", f"{output}_{method}.json"]
        processes[method] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    failed = [method for method, process in processes.items() if process.wait() != 0]
    if failed:
        raise SystemExit(f"error: evaluation of {', '.join(failed)} failed (its message is above)")
    results = {method: json.loads(Path(f"{output}_{method}.json").read_text()) for method in policies}
    return {
        method: {"success": result["success"], "loss": result["loss"]} for method, result in results.items()
    }


def print_table(summary: dict[str, Any]) -> None:
    tasks = [*summary["old_tasks"], *summary["new_tasks"]]
    print(f"\n{summary['steps']} steps on {summary['ranks']} {ENGINES[summary['engine']]} ranks")
    for measure in ("success", "loss"):
        old, new = ", ".join(summary["old_tasks"]), ", ".join(summary["new_tasks"])
        print(f"\n{measure} a task (old: {old}; new: {new})")
        header = "".join(f"{task.removesuffix('-v3')[:18]:>20s}" for task in tasks)
        print(f"{'method':14s}{'seed':>5s}{header}{'old mean':>10s}")
        for row in sorted(summary["rows"], key=lambda row: (METHODS.index(row["method"]), row["seed"])):
            values = "".join(f"{row[measure][task]:20.2f}" for task in tasks)
            mean = statistics.mean(row[measure][task] for task in summary["old_tasks"])
            print(f"{row['method']:14s}{row['seed']:5d}{values}{mean:10.2f}")
    print()
    for row in summary["rows"]:
        if row["method"] != "teacher":
            print(
                f"{row['method']:14s}{row['seed']:5d}  peak memory {row['peak_memory_mb']:.0f} MiB a rank, "
                f"{row['step_seconds']:.2f} s a step"
            )


def script(name: str, *arguments: object) -> None:
    call([sys.executable, f"scripts/{name}", *map(str, arguments)])


def call(command: list[str]) -> None:
    # The repository's root, so that the commands printed by --help and in the README are these.
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(f"error: the command above ended with status {result.returncode}")


def say(message: str) -> None:
    print(f"demo: {message}", flush=True)
