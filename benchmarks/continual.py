"""Continual learning: does a policy keep its old tasks while it learns new ones, and better than by replay?

    python benchmarks/continual.py --tier cw5               # run what is missing; stop and start again
    python benchmarks/continual.py --tier cw5 --page docs   # write the tables and plots of what has run

Every cell (method, stored samples per task, order of tasks, seed) is a `craft-ds sequence`. Its result is a
small JSON file in --results, with which it is not run again until its settings change; --work keeps data,
the start policy and unfinished runs. Tuning cells have seeds and scenes of their own and run first: of the
methods that differ in a setting only, the one that tuning chose is run again and reported.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from continual_parts.cells import (
    HELDOUT_DEMONSTRATIONS,
    HELDOUT_SEED,
    TRAINING_SEED,
    Cell,
    Places,
    cells,
    plan_of,
    recordings,
    settings_of,
)
from continual_parts.methods import METHODS
from continual_parts.page import page_lines
from continual_parts.plot import plot_tier
from continual_parts.report import chosen_settings, report_lines
from continual_parts.tiers import TIERS, Tier
from harness import OUTPUTS, ROOT, argument_parser

from craft_ds.cli import run_main
from craft_ds.commands.sequence import keep_plan
from craft_ds.commands.sequence_file import read_plan
from craft_ds.commands.subcommands import subcommand
from craft_ds.errors import UserError
from craft_ds.tensor_io.filesystem import atomic_file

RESULTS = ROOT / "benchmarks" / "results" / "continual"


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--tier", choices=TIERS, required=True)
    add("--methods", choices=METHODS, nargs="+", help="only these (default: those of the tier)")
    add("--purposes", choices=("tuning", "report"), nargs="+", default=["tuning", "report"])
    add("--jobs", type=int, default=2, help="cells at once, one core each (default: 2)")
    add("--minutes", type=float, help="start no cell after this time")
    add("--all_settings", action="store_true", help="report every setting, not only what tuning chose")
    add("--list", action="store_true", help="list the cells and whether they are done")
    add("--report", action="store_true", help="print the table")
    add("--page", type=Path, help="write continual_TIER.md and .png into this directory")
    add("--work", type=Path, default=OUTPUTS / "continual", help="data and unfinished runs")
    add("--results", type=Path, default=RESULTS, help="JSON files of the cells, in a directory per tier")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    results = args.results / args.tier
    if args.report or args.page:
        places = Places.of(args.work, args.tier)
        done = [cell for cell in cells(args.tier) if is_done(results, cell, places)]
        found = [read_result(results, cell) for cell in done]
        print("\n".join(report_lines(args.tier, found)))
        if args.page and found:
            picture = args.page / f"continual_{args.tier}.png"
            plot_tier(args.tier, found, picture)
            page = "\n".join(page_lines(args.tier, found, picture.name))
            picture.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        return
    tier, places = TIERS[args.tier], Places.of(args.work, args.tier)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    failed: list[str] = []
    for purpose in args.purposes:
        wanted = wanted_cells(args, purpose, results, places)
        missing = [cell for cell in wanted if not is_done(results, cell, places)]
        print(f"{purpose}: {len(wanted) - len(missing)} of {len(wanted)} cells are done", flush=True)
        if args.list:
            print("\n".join(f"{'missing' if cell in missing else 'done':8s}{cell.name}" for cell in wanted))
        elif missing:
            prepare(tier, places)
            failed += run_cells(missing, places, results, args.jobs, deadline)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see their logs in {places.runs}")


def wanted_cells(args: argparse.Namespace, purpose: str, results: Path, places: Places) -> list[Cell]:
    """Return the cells to run for a purpose: of methods that differ in a setting, what tuning chose.

    Until the tuning of a family is complete, all its settings are reported; with --all_settings always.
    """
    wanted = [one for one in cells(args.tier, (purpose,)) if not args.methods or one.method in args.methods]
    if purpose == "tuning" or args.all_settings:
        return wanted
    tuned = [cell for cell in cells(args.tier, ("tuning",)) if is_done(results, cell, places)]
    chosen = chosen_settings(args.tier, [read_result(results, cell) for cell in tuned])
    return [
        one
        for one in wanted
        if chosen.get((METHODS[one.method].family, one.budget), one.method) == one.method
    ]


def prepare(tier: Tier, places: Places) -> None:
    """Record the demonstrations and make the start policy, unless they exist."""
    for root, seed, episodes in (
        (places.data, TRAINING_SEED, tier.demonstrations),
        (places.heldout, HELDOUT_SEED, HELDOUT_DEMONSTRATIONS),
    ):
        for directory, tasks in recordings(tier, root).items():
            record = ["worlds", "record", f"--world={tier.world}", f"--output_dir={directory}"]
            call(
                *record, f"--seed={seed}", f"--episodes_per_task={episodes}", f"--drift={tier.drift}", *tasks
            )
    if not places.start.exists():
        data = places.start.with_name(f"{places.start.name}_data")
        call(
            "worlds",
            "pretrain",
            f"--world={tier.world}",
            f"--output_dir={places.start}",
            f"--data_dir={data}",
        )


def call(*arguments: str) -> None:
    """Run a subcommand of craft-ds.

    Raises:
        UserError: It failed.
    """
    if subprocess.run(subcommand(*arguments), check=False).returncode:
        raise UserError(f"craft-ds {' '.join(arguments)} failed (its message is above)")


def run_cells(
    missing: list[Cell], places: Places, results: Path, jobs: int, deadline: float | None
) -> list[str]:
    """Run cells, several at once; return the names of those that failed."""
    failed: list[str] = []
    printing = threading.Lock()

    def run(cell: Cell) -> None:
        if deadline is not None and time.monotonic() > deadline:
            return
        started = time.monotonic()
        try:
            done = run_cell(cell, places, results)
        except UserError as error:
            print(f"{cell.name}: {error}", file=sys.stderr)
            done = False
        with printing:
            print(
                f"{cell.name}: {'done' if done else 'failed'} in {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if not done:
                failed.append(cell.name)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, missing))
    return failed


def run_cell(cell: Cell, places: Places, results: Path) -> bool:
    """Run a cell or continue it, and keep its result; return False if it failed."""
    directory = places.runs / cell.name
    directory.mkdir(parents=True, exist_ok=True)
    plan, file = plan_of(cell, places, directory / "sequence"), directory / "plan.yaml"
    file.write_text(json.dumps(plan, indent=1), encoding="utf-8")  # JSON is YAML
    keep_plan(read_plan(file))  # what follows is a part of the sequence
    start, shared = directory / "sequence" / "00_start" / "eval.json", places.runs / start_evaluation(plan)
    if shared.exists() and not start.exists():
        start.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared, start)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (directory / "log").open("a") as log:
        ended = subprocess.run(
            subcommand("sequence", file), env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode:
        return False
    with atomic_file(shared) as temporary:
        shutil.copyfile(start, temporary)
    success = json.loads((directory / "sequence" / "success.json").read_text(encoding="utf-8"))
    loss = directory / "sequence" / "loss.json"
    result = {
        "cell": cell.__dict__,
        "settings": settings_of(cell, plan),
        "success": {name: success[name] for name in ("tasks", "rows", "R", "metrics")},
        "loss": {n: json.loads(loss.read_text())[n] for n in ("tasks", "R", "metrics")}
        if loss.exists()
        else None,
        **from_metrics(directory / "sequence"),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("craft-ds", "torch", "lerobot")},
    }
    results.mkdir(parents=True, exist_ok=True)
    with atomic_file(result_file(results, cell)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(directory / "sequence")  # a policy and its checkpoints for each stage
    return True


def start_evaluation(plan: dict[str, Any]) -> str:
    """Return the name of the file that keeps the start policy's evaluation.

    Cells that run the same policy in the same scenes and on the same held-out data share it, whatever their
    methods.
    """
    stages = [{name: stage.get(name) for name in ("tasks", "heldout")} for stage in plan["stages"]]
    start = {name: plan["start"].get(name) for name in ("policy", "tasks", "heldout")}
    text = json.dumps([start, stages, plan["evaluation"]])
    return f"start_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def from_metrics(sequence: Path) -> dict[str, list[float]]:
    """Return λ at the end of each stage that had one, and the mean conflict rate of each that measured it."""
    found: dict[str, list[float]] = {"last_lambda": [], "conflict_rate": []}
    for metrics in sorted(sequence.glob("*/train/metrics.jsonl")):
        rows = list(map(json.loads, metrics.read_text(encoding="utf-8").splitlines()))
        found["last_lambda"] += [row["craft/lambda_final"] for row in rows if "craft/lambda_final" in row]
        if rates := [row["craft/conflict_rate"] for row in rows if "craft/conflict_rate" in row]:
            found["conflict_rate"].append(fmean(rates))
    return found


def is_done(results: Path, cell: Cell, places: Places) -> bool:
    """Return True if the cell has a result with the present settings."""
    file = result_file(results, cell)
    if not file.exists():
        return False
    settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
    return bool(settings == json.loads(json.dumps(settings_of(cell, plan_of(cell, places, Path("out"))))))


def result_file(results: Path, cell: Cell) -> Path:
    return results / f"{cell.name}.json"


def read_result(results: Path, cell: Cell) -> dict[str, Any]:
    """Return the result of a cell that is done."""
    found: dict[str, Any] = json.loads(result_file(results, cell).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(run_main(main))
