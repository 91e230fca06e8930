"""Fine-tune the embedded policy on a new robot task by three methods; measure old and new tasks.

Record demonstrations, build the anchor cache, and fine-tune the shipped teacher with every seed by plain
fine-tuning, by replay of the anchors, and by CRaFT, with the same steps and samples. Then run every policy in
the simulator. The methods' settings are those that `benchmarks/continual.py --tier metaworld` chose on other
seeds and scenes. With --lora, LoRA adapters are trained too. The results are a table,
OUTPUT_DIR/summary.json and OUTPUT_DIR/summary.png.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from craft_ds.commands.subcommands import call_side_by_side, craft_ds, subcommand, training_command
from craft_ds.errors import UserError

SEEDS = (21, 22, 23)
"""Seeds of fine-tuning that no setting was chosen with."""
EVAL_SEED = 5000
"""Seed of the evaluation scenes, which neither the demonstrations show nor the benchmark uses."""
HELDOUT_SEED = 7
"""Seed of the demonstrations that the loss is measured on."""
HELDOUT_EPISODES = 5
TRAINING_FLAGS = [
    "--policy.optimizer_lr=5e-4",
    "--policy.scheduler_warmup_steps=0",
    "--num_workers=0",
    "--save_freq=0",
]
REPLAY_FLAGS = ["--craft.preset=replay", "--craft.initial_lambda=1"]
CRAFT_FLAGS = ["--craft.preset=recommended"]
LORA_FLAGS = ["--lora=preset", "--policy.optimizer_lr=3e-3"]
METHODS = ("teacher", "baseline", "replay", "craft", "lora_baseline", "lora_craft")
ENGINES = {"single": "one process", "zero3": "ZeRO-3 ranks", "fsdp": "FSDP2 ranks"}
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
    add("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of fine-tuning (default: 21 22 23)")
    add("--steps", type=int, default=400, help="optimizer steps of each fine-tuning (default: 400)")
    add(
        "--engine",
        choices=tuple(ENGINES),
        default="single",
        help="one process, or DeepSpeed ZeRO-3 or FSDP2 on several ranks (default: single)",
    )
    add("--ranks", type=int, help="ranks that share the policy (default: 2; single: 1)")
    add("--jobs", type=int, help="fine-tuning runs at once (default: CPU cores / ranks)")
    add("--lora", action="store_true", help="train LoRA adapters too, with and without CRaFT")
    add("--batch_size", type=int, default=16, help="samples per step over all ranks (default: 16)")
    add("--num_anchors", type=int, default=300, help="anchors of the old tasks (default: 300)")
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
    for name in ("steps", "ranks", "jobs", "batch_size", "num_anchors", "episodes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    started = time.monotonic()
    args.ranks = choose_ranks(args.engine, args.ranks)
    cores, runs = os.cpu_count() or 1, len(args.seeds) * len(methods(Path(), args))
    args.jobs = args.jobs or min(max(1, cores // args.ranks), runs)
    # Processes side by side share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (args.jobs * args.ranks))))
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


def choose_ranks(engine: str, ranks: int | None) -> int:
    """Return the number of ranks of a run.

    Raises:
        UserError: The engine has no ranks, or is not installed.
    """
    if engine == "single":
        if ranks not in (None, 1):
            raise UserError(f"--ranks={ranks} needs an engine that shards: add --engine=fsdp or zero3")
        return 1
    if engine == "zero3" and not find_spec("deepspeed"):
        raise UserError(f"--engine=zero3: DeepSpeed is not installed; {_INSTALL}, or use --engine=fsdp")
    return ranks or 2


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
        "--targets",
        "teacher_kl",
    )

    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    kinds = methods(cache, args)
    # The longest first: then all cores are in use until the end.
    order = sorted(kinds, key=lambda method: method in ("baseline", "lora_baseline"))
    trained = {f"{method}_seed{seed}": (method, seed) for method in order for seed in args.seeds}
    say(
        f"{args.steps} steps in {place(args)} each, {args.jobs} at once, with their output in {runs}/*.log: "
        f"{', '.join(trained)}"
    )
    commands = (
        (name, training(args, teacher, data / "new", runs / name, seed, kinds[method]))
        for name, (method, seed) in trained.items()
    )
    call_side_by_side(commands, runs, args.jobs)
    policies = {"teacher": teacher, **{name: runs / name / "final" for name in trained}}
    say(f"closed-loop evaluation, {args.episodes} episodes per task")
    results = evaluate_policies(policies, args, heldout, runs)
    nothing = {"peak_memory_mb": None, "step_seconds": None}
    rows = [{"method": "teacher", "seed": args.seeds[0], **results["teacher"], **nothing}]
    rows += [
        {"method": method, "seed": seed, **results[name], **run_figures(runs / name)}
        for name, (method, seed) in trained.items()
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
        "flags": kinds,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "rows": rows,
    }


def methods(cache: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the further flags of each fine-tuning method."""
    anchors = [f"--craft.anchor_cache_dir={cache}", f"--craft.anchor_batch_size={rank_batch_size(args)}"]
    kinds: dict[str, list[str]] = {
        "baseline": [],
        "replay": [*REPLAY_FLAGS, *anchors],
        "craft": [*CRAFT_FLAGS, *anchors, *args.craft_flags],
    }
    if args.lora:
        kinds |= {f"lora_{method}": [*LORA_FLAGS, *kinds[method]] for method in ("baseline", "craft")}
    return kinds


def rank_batch_size(args: argparse.Namespace) -> int:
    return max(1, args.batch_size // args.ranks)


def training(
    args: argparse.Namespace, teacher: Path, data: Path, run: Path, seed: int, flags: list[str]
) -> list[str]:
    """Return the command of a fine-tuning run."""
    return [
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


def place(args: argparse.Namespace) -> str:
    """Return where a run trains, in words."""
    return ENGINES[args.engine] if args.engine == "single" else f"{args.ranks} {ENGINES[args.engine]}"


def run_figures(run: Path) -> dict[str, float]:
    """Return the median seconds per step and the peak memory per rank that a run has logged."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "peak_memory_mb": max(row["memory/peak_mb"] for row in rows if "memory/peak_mb" in row),
        "step_seconds": statistics.median(row["time/step_s"] for row in rows if "time/step_s" in row),
    }


def evaluate_policies(
    policies: Mapping[str, Path], args: argparse.Namespace, heldout: Path, output: Path
) -> dict[str, dict[str, Any]]:
    """Return success and loss by task of each policy."""
    files = {name: output / f"{name}_eval.json" for name in policies}
    options = ["--world", args.world, "--episodes", args.episodes, "--seed", args.eval_seed]
    options += ["--data_root", heldout]
    commands = (
        (file.stem, subcommand("eval", f"--policy.path={policies[name]}", *options, "--output", file))
        for name, file in files.items()
    )
    call_side_by_side(commands, output, os.cpu_count() or 1)
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {
        name: {measure: result[measure] for measure in ("success", "loss")}
        for name, result in results.items()
    }


def print_table(summary: dict[str, Any]) -> None:
    tasks = [*summary["old_tasks"], *summary["new_tasks"]]
    print(f"\n{summary['steps']} steps, engine {summary['engine']}, ranks: {summary['ranks']}")
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
