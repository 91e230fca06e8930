"""The commands on the device: anchors, training with every engine, resume, export and evaluation.

Data of the blocks world is recorded on the spot; the embedded teacher is fine-tuned for a few steps.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import ROOT, default_device

from craft_ds.worlds import teacher_directory

STEPS = 8
TEACHER = teacher_directory("blocks")
ENGINES = {
    "single": [],
    "fsdp": ["--engine=fsdp"],
    "zero3": ["--ds_config=zero3"],
    "zero3, bf16": ["--ds_config=zero3", "--engine.dtype=bfloat16"],
    "fsdp, LoRA": ["--engine=fsdp", "--lora=preset"],
}
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}
_WORKERS = max(2, min(6, (os.cpu_count() or 2) // 2))


def run(small: bool) -> dict[str, Any]:
    """Run the commands; return the losses of each run and how they differ."""
    device = default_device().type
    engines = dict(list(ENGINES.items())[: 2 if small else None])
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(_WORKERS) as pool:
        root = Path(directory)
        record = ("worlds", "record", "--world", "blocks", "--episodes_per_task", "4")
        _command(*record, "--output_dir", root / "data")
        _command(
            "anchors",
            "--dataset_repo_id=craft-ds/blocks-old",
            f"--dataset_root={root / 'data' / 'old'}",
            f"--policy_path={TEACHER}",
            f"--output_dir={root / 'anchors'}",
            "--num_samples=32",
            "--num_workers=0",
            f"--device={device}",
        )

        def attempt(name: str) -> dict[str, Any]:
            try:
                return {"engine": name, **_train_and_resume(root, name, engines[name], device)}
            except RuntimeError as error:
                return {"engine": name, "error": str(error)[-1500:]}

        rows = list(pool.map(attempt, engines))
        reference = rows[0].get("losses")
        for row in rows:
            if "error" not in row and reference and "LoRA" not in row["engine"]:
                # The first steps: later ones are far apart in bf16 wherever they are computed.
                count = 2 if "bf16" in row["engine"] else STEPS
                row["from_single"] = _largest(row["losses"][:count], reference[:count])
        final = root / "single" / "final"
        others: dict[str, Any] = {}
        try:
            _command("export", final, f"--output={root / 'exported'}")
            _command(
                *("eval", f"--policy.path={root / 'exported'}", "--world", "blocks", "--episodes", "2"),
                *("--output", root / "eval.json"),
            )
            others["success"] = json.loads((root / "eval.json").read_text())["success"]
        except RuntimeError as error:
            others["error"] = str(error)[-1500:]
    ok = "error" not in others and all("error" not in row and _right(row) for row in rows)
    return {"device": device, "steps": STEPS, "rows": rows, "export": others, "ok": ok}


def _right(row: dict[str, Any]) -> bool:
    limit = LIMITS["bfloat16" if "bf16" in row["engine"] else "float32"]
    return row["resumed"] <= limit and row.get("from_single", 0.0) <= limit


def _train_and_resume(root: Path, name: str, flags: list[str], device: str) -> dict[str, Any]:
    """Train, then resume from the middle; return the losses and the difference of the resumed run's."""
    output = root / name.replace(", ", "_")
    common = [
        f"--policy.path={TEACHER}",
        f"--policy.device={device}",
        "--dataset.repo_id=craft-ds/blocks-new",
        f"--dataset.root={root / 'data' / 'new'}",
        f"--steps={STEPS}",
        "--batch_size=4",
        "--log_freq=1",
        f"--save_freq={STEPS // 2}",
        "--num_workers=0",
        "--seed=3",
        "--engine.tf32=false",  # which rounds differently in each engine
        "--craft.enabled=true",
        "--craft.retention_freq=2",
        f"--craft.anchor_cache_dir={root / 'anchors'}",
        "--craft.anchor_batch_size=4",
    ]
    launch = [] if name == "single" else _launcher()
    _command("train", *common, f"--output_dir={output}", *flags, launch=launch)
    complete = _losses(output)
    resumed = root / f"{output.name}_resumed"
    shutil.copytree(output, resumed, symlinks=True, ignore=shutil.ignore_patterns("final", "last"))
    middle = resumed / f"step_{STEPS // 2:06d}" / "train_config.json"
    shutil.rmtree(resumed / f"step_{STEPS:06d}", ignore_errors=True)
    _command("train", f"--config_path={middle}", "--resume=true", launch=launch)
    rest = _losses(resumed)
    return {"losses": complete, "resumed": _largest(rest, complete[-len(rest) :])}


def _losses(output: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "craft/retention_loss", "craft/lambda")
    found = [[row[name] for name in names if row.get(name) is not None] for row in rows if names[0] in row]
    if not found:
        raise RuntimeError(f"no losses in {sorted({key for row in rows for key in row})}")
    return found


def _largest(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(
        abs(value - other) / max(abs(other), 1e-9)
        for row, others in zip(found, expected, strict=True)
        for value, other in zip(row, others, strict=True)
    )


def _launcher() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={port}"]


def _command(*arguments: object, launch: list[str] | None = None) -> None:
    command = [sys.executable, *(launch or []), "-m", "craft_ds", *map(str, arguments)]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    end = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if end.returncode:
        name, output = " ".join(map(str, arguments[:3])), end.stdout + end.stderr
        raise RuntimeError(f"{name}: status {end.returncode}\n{output[-1400:]}")


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        f"Commands: {result['steps']} steps of the blocks world's teacher, every second a retention step; "
        "largest relative differences of losses and λ (bf16: of the first two steps)",
        "",
        "| engine, one rank | from the single process | resumed from uninterrupted |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['engine']} | {' '.join(row['error'].split())[-200:]} | |")
        else:
            other = f"{row['from_single']:.1e}" if "from_single" in row else "–"
            lines.append(f"| {row['engine']} | {other} | {row['resumed']:.1e} |")
    return [*lines, "", f"export and evaluation: {result['export']}"]
