"""Fine-tune the embedded policy on a new robot task with and without CRaFT; measure old and new tasks.

Record demonstrations, build the anchor cache, and fine-tune the shipped teacher twice per seed on several
ranks of ZeRO-3 or FSDP2: once as the plain baseline, once with CRaFT, with the same steps and samples. Then
run every policy in the simulator. With --lora, LoRA adapters are trained too, with and without CRaFT. The
results are a table, OUTPUT_DIR/summary.json and OUTPUT_DIR/summary.png.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from craft_ds.commands.subcommands import call, craft_ds, fail, subcommand, training_command
from craft_ds.errors import UserError

EVAL_SEED = 1000
"""Seed of the evaluation scenes, of which the demonstrations show none."""
HELDOUT_SEED = 7
"""Seed of the demonstrations that the loss is measured on."""
HELDOUT_EPISODES = 5
TRAINING_FLAGS = [
    "--policy.optimizer_lr=5e-4",
    "--policy.scheduler_warmup_steps=0",
    "--num_workers=0",
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
_INSTALL = "pip install 'craft-ds[deepspeed,world]'"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="craft-ds demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--world",
        choices=("auto", "metaworld", "blocks"),
        default="auto",
        help="auto: metaworld where MuJoCo can render, else blocks (default: auto)",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of fine-tuning (default: 0)")
    add("--steps", type=int, default=400, help="optimizer steps of each fine-tuning (default: 400)")
    add(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="DeepSpeed ZeRO-3 or FSDP2 (default: zero3 where DeepSpeed is installed, else fsdp)",
    )
    add("--lora", action="store_true", help="train LoRA adapters too, with and without CRaFT")
    add("--ranks", type=int, default=2, help="ranks that share the policy (default: 2)")
    add("--batch_size", type=int, default=16, help="samples per step over all ranks (default: 16)")
    add("--num_anchors", type=int, default=1000, help="anchors of the old tasks (default: 1000)")
    add("--episodes", type=int, default=20, help="simulator episodes per task (default: 20)")
    add("--eval_seed", type=int, default=EVAL_SEED, help=f"seed of their scenes (default: {EVAL_SEED})")
    add("--output_dir", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    add(
        "--plot",
        type=Path,
        nargs=2,
        metavar=("SUMMARY.json", "PICTURE.png"),
        help="only draw the picture of an earlier demo",
    )
    add(
        "craft_flags",
        nargs="*",
        help="after --: further flags for the CRaFT runs, such as --craft.lambda_lr=1",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    if args.plot:
        plot(*args.plot)
        return
    for name in ("steps", "ranks", "batch_size", "num_anchors", "episodes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    started = time.monotonic()
    args.engine = choose_engine(args.engine)
    args.world = choose_world(args.world)
    summary = run_demo(args)
    file, picture = args.output_dir / "summary.json", args.output_dir / "summary.png"
    file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot(file, picture)
    print_table(summary)
    say(f"done in {(time.monotonic() - started) / 60:.1f} minutes: {file}, {picture}")


def plot(summary: Path, picture: Path) -> None:
    """Draw the picture of a summary.

    Raises:
        UserError: The summary cannot be read.
    """
    from craft_ds.commands.demo_plot import plot_demo  # late: matplotlib is not needed for --help

    try:
        plot_demo(json.loads(summary.read_text(encoding="utf-8")), picture)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--plot {summary}: not a summary of craft-ds demo ({error})") from error


def choose_engine(name: str) -> str:
    """Return the engine to train with; `auto` is ZeRO-3 where DeepSpeed is installed, else FSDP2.

    Raises:
        UserError: ZeRO-3 was asked for and DeepSpeed is not installed.
    """
    if name == "fsdp" or find_spec("deepspeed"):
        return "zero3" if name == "auto" else name
    if name == "zero3":
        raise UserError(f"--engine=zero3: DeepSpeed is not installed; {_INSTALL}, or use --engine=fsdp")
    say(f"DeepSpeed is not installed ({_INSTALL}); training on FSDP2")
    return "fsdp"


def choose_world(name: str) -> str:
    """Return the world to use; `auto` is Meta-World where it can render, else the blocks.

    Raises:
        UserError: Meta-World was asked for and cannot be used here.
    """
    if name == "blocks":
        return name
    from craft_ds.worlds import gl_problem  # late: numpy is not needed for --help

    problem = gl_problem()
    if problem is None:
        return "metaworld"
    if name == "metaworld":
        raise UserError(f"--world={name}: {problem}; or use --world=blocks")
    say(problem)
    say("using the world of coloured blocks, which needs no GL")
    return "blocks"


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Record, train and evaluate; return the summary."""
    from craft_ds.worlds import make_world, teacher_directory

    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    teacher = teacher_directory(args.world)
    data, heldout = output / f"{args.world}_data", output / f"{args.world}_heldout"
    cache, runs = output / f"{args.world}_anchors", output / f"{args.world}_runs"

    say(f"demonstrations in {data}")
    record = ("worlds", "record", "--world", args.world, "--output_dir")
    craft_ds(*record, data)
    craft_ds(*record, heldout, "--episodes_per_task", HELDOUT_EPISODES, "--seed", HELDOUT_SEED)

    say(f"anchor cache in {cache}")
    craft_ds(
        "anchors",
        f"--dataset_repo_id=craft-ds/{args.world}-old",
        f"--dataset_root={data / 'old'}",
        f"--policy_path={teacher}",
        f"--output_dir={cache}",
        f"--num_samples={args.num_anchors}",
        "--num_workers=0",
    )

    shutil.rmtree(runs, ignore_errors=True)
    rows = []
    for seed in args.seeds:
        policies = {"teacher": teacher} if seed == args.seeds[0] else {}
        figures: dict[str, Any] = {"teacher": {"peak_memory_mb": None, "step_seconds": None}}
        for method, flags in methods(cache, args).items():
            say(f"{method}, seed {seed}: {args.steps} steps on {args.ranks} {ENGINES[args.engine]} ranks")
            run = runs / f"{method}_seed{seed}"
            train(args, teacher, data / "new", run, seed, flags)
            policies[method] = run / "final"
            figures[method] = run_figures(run)
        say(f"closed-loop evaluation, {args.episodes} episodes per task: {', '.join(policies)}")
        results = evaluate_policies(policies, args, heldout, runs / f"seed{seed}")
        rows += [
            {"method": method, "seed": seed, **result, **figures[method]}
            for method, result in results.items()
        ]

    world = make_world(args.world)
    return {
        "world": args.world,
        "engine": args.engine,
        "old_tasks": list(world.old_tasks),
        "new_tasks": list(world.new_tasks),
        "steps": args.steps,
        "episodes": args.episodes,
        "eval_seed": args.eval_seed,
        "ranks": args.ranks,
        "craft_flags": craft_flags(cache, args),
        "lora_flags": LORA_FLAGS if args.lora else None,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "rows": rows,
    }


def methods(cache: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the further flags of each fine-tuning method."""
    kinds: dict[str, list[str]] = {"baseline": [], "craft": craft_flags(cache, args)}
    if args.lora:
        kinds |= {f"lora_{method}": [*LORA_FLAGS, *flags] for method, flags in kinds.items()}
    return kinds


def craft_flags(cache: Path, args: argparse.Namespace) -> list[str]:
    return [
        *CRAFT_FLAGS,
        f"--craft.anchor_cache_dir={cache}",
        f"--craft.anchor_batch_size={rank_batch_size(args)}",
        *args.craft_flags,
    ]


def rank_batch_size(args: argparse.Namespace) -> int:
    return max(1, args.batch_size // args.ranks)


def train(
    args: argparse.Namespace, teacher: Path, data: Path, run: Path, seed: int, flags: list[str]
) -> None:
    call(
        [
            *training_command(args.engine, args.ranks),
            f"--policy.path={teacher}",
            f"--dataset.repo_id=craft-ds/{args.world}-new",
            f"--dataset.root={data}",
            f"--output_dir={run}",
            f"--steps={args.steps}",
            f"--seed={seed}",
            f"--log_freq={min(20, args.steps)}",
            f"--batch_size={rank_batch_size(args)}",
            *TRAINING_FLAGS,
            *flags,
        ]
    )


def run_figures(run: Path) -> dict[str, float]:
    """Return the median seconds per step and the peak memory per rank that a run has logged."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "peak_memory_mb": max(row["memory/peak_mb"] for row in rows if "memory/peak_mb" in row),
        "step_seconds": statistics.median(row["time/step_s"] for row in rows if "time/step_s" in row),
    }


def evaluate_policies(
    policies: dict[str, Path], args: argparse.Namespace, heldout: Path, output: Path
) -> dict[str, dict[str, Any]]:
    """Return success and loss by task of each policy; the policies run side by side."""
    files = {method: Path(f"{output}_{method}.json") for method in policies}
    processes = {}
    for method, policy in policies.items():
        command = subcommand("eval", f"--policy.path={policy}")
        command += ["--world", args.world, "--episodes", str(args.episodes), "--seed", str(args.eval_seed)]
        command += ["--data_root", str(heldout), "--output", str(files[method])]
        processes[method] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    failed = [method for method, process in processes.items() if process.wait() != 0]
    if failed:
        fail(f"evaluation of {', '.join(failed)} failed (its message is above)")
    results = {method: json.loads(file.read_text(encoding="utf-8")) for method, file in files.items()}
    return {
        method: {"success": result["success"], "loss": result["loss"]} for method, result in results.items()
    }


def print_table(summary: dict[str, Any]) -> None:
    tasks = [*summary["old_tasks"], *summary["new_tasks"]]
    print(f"\n{summary['steps']} steps on {summary['ranks']} {ENGINES[summary['engine']]} ranks")
    for measure in ("success", "loss"):
        old, new = ", ".join(summary["old_tasks"]), ", ".join(summary["new_tasks"])
        print(f"\n{measure} by task (old: {old}; new: {new})")
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
                f"{row['method']:14s}{row['seed']:5d}  peak memory {row['peak_memory_mb']:.0f} MiB per rank, "
                f"{row['step_seconds']:.2f} s per step"
            )


def say(message: str) -> None:
    print(f"demo: {message}", flush=True)
