"""Run the whole way of a robotics lab at a realistic shape, and measure the seconds and bytes of each part.

    python benchmarks/bench_realistic.py --episodes 2 --steps 6

Three cameras of 480x640 pixels as video, state and action of 14 entries, chunks of 50 actions at 30 fps,
quantile statistics, two old tasks and a new one. Every part is the command that a user types; the policy is a
pi0_fast of 1 M random parameters, so that the parts around the model are what takes the time. The last part
loads the exported policy with LeRobot alone and compares the actions that perfect tokens stand for with the
recorded ones.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import OUTPUTS, ROOT, argument_parser, hardware, write_result
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_IMAGES, OBS_STATE

from craft_ds.cli import run_main
from craft_ds.data.policy_input import images_to_float
from craft_ds.policies.directory import save_policy_directory
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastPolicy, build_tiny_policy
from craft_ds.policies.tiny_pi0_fast.tokenizers import (
    ACTION_TOKENIZER,
    TEXT_TOKENIZER,
    build_text_tokenizer,
    fit_action_tokenizer,
)

CAMERAS = ("top", "left_wrist", "right_wrist")
HEIGHT, WIDTH, ENTRIES, CHUNK, FPS = 480, 640, 14, 50, 30
TASKS = ("fold the towel", "put the cup on the tray", "open the drawer")
MAX_TOKENS = 400
ACTION_VOCABULARY = 1024
JOINTS = [f"{side}_joint_{number}" for side in ("left", "right") for number in range(ENTRIES // 2)]


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--episodes", type=int, default=3, help="episodes per task (default: 3)")
    parser.add_argument("--frames", type=int, default=90, help="frames per episode (default: 90)")
    parser.add_argument("--anchors", type=int, default=64, help="anchors (default: 64)")
    parser.add_argument("--steps", type=int, default=8, help="training steps, an even number (default: 8)")
    parser.add_argument("--ranks", type=int, default=2, help="FSDP2 ranks (default: 2)")
    parser.add_argument("--output", type=Path, default=OUTPUTS / "realistic", help="directory to create anew")
    return parser.parse_args()


def features() -> dict[str, dict[str, Any]]:
    camera = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (ENTRIES,), "names": JOINTS}
    return {**{f"{OBS_IMAGES}.{name}": camera for name in CAMERAS}, OBS_STATE: vector, ACTION: vector}


def record(root: Path, tasks: tuple[str, ...], episodes: int, frames: int, seed: int) -> None:
    """Record moving patterns and smooth trajectories of radians."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    dataset = LeRobotDataset.create(
        f"craft-ds/{root.name}",
        fps=FPS,
        features=features(),
        root=root,
        use_videos=True,
        video_backend="pyav",
    )
    for episode in range(episodes * len(tasks)):
        phase, speed = rng.uniform(0, 2 * np.pi, ENTRIES), rng.uniform(0.5, 2.0, ENTRIES)
        for frame in range(frames):
            angles = np.sin(phase + speed * frame / FPS) * np.linspace(0.3, 3.0, ENTRIES)
            following = np.sin(phase + speed * (frame + 1) / FPS) * np.linspace(0.3, 3.0, ENTRIES)
            sample: dict[str, Any] = {
                f"{OBS_IMAGES}.{name}": np.stack(
                    [columns + np.uint8(5 * frame % 256), rows + np.uint8(50 * shift), rows + columns],
                    axis=-1,
                )
                for shift, name in enumerate(CAMERAS)
            }
            sample |= {OBS_STATE: angles.astype(np.float32), ACTION: following.astype(np.float32)}
            dataset.add_frame({**sample, "task": tasks[episode % len(tasks)]})
        dataset.save_episode()
    dataset.finalize()


def write_base_policy(path: Path, data: Path) -> None:
    """Write a policy without statistics, as base policies on the hub are."""
    actions = np.array(opened(data).hf_dataset.data.column(ACTION).to_pylist(), dtype=np.float32)
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    normalised = 2 * (actions - low) / (high - low) - 1
    chunks = np.stack([normalised[start : start + CHUNK] for start in range(len(normalised) - CHUNK)])
    build_text_tokenizer(TASKS, path / TEXT_TOKENIZER, ACTION_VOCABULARY)
    fit_action_tokenizer(np.clip(chunks, -1.5, 1.5), path / ACTION_TOKENIZER, vocab_size=ACTION_VOCABULARY)
    policy, *processors = build_tiny_policy(
        features(),
        {},
        path / TEXT_TOKENIZER,
        path / ACTION_TOKENIZER,
        0,
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_action_tokens=MAX_TOKENS,
        max_decoding_steps=MAX_TOKENS,
        tokenizer_max_length=200,
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.QUANTILES,
            "ACTION": NormalizationMode.QUANTILES,
        },
    )
    save_policy_directory(policy, *processors, path)


def opened(root: Path, chunk: int | None = None) -> LeRobotDataset:
    deltas = {ACTION: [step / FPS for step in range(chunk)]} if chunk else None
    return LeRobotDataset(f"craft-ds/{root.name}", root=root, delta_timestamps=deltas, video_backend="pyav")


def perfect_tokens_error(policy_dir: Path, data: Path) -> float:
    """Return the mean error of decoded perfect tokens in shares of the action's range, by LeRobot alone."""
    config = PreTrainedConfig.from_pretrained(policy_dir)
    policy = TinyPI0FastPolicy.from_pretrained(policy_dir, config=config)
    pre, post = make_pre_post_processors(config, pretrained_path=str(policy_dir))
    dataset = opened(data, CHUNK)
    raw = torch.utils.data.default_collate([dataset[row] for row in (0, len(dataset) // 2)])
    batch = pre(images_to_float(dict(raw)))
    tokens = torch.where(batch[ACTION_TOKEN_MASK], batch[ACTION_TOKENS], 0)[:, 1:]
    found = post(policy.detokenize_actions(tokens, config.n_action_steps, ENTRIES))
    actions = torch.tensor(dataset.hf_dataset.data.column(ACTION).to_pylist())
    spread = actions.amax(0) - actions.amin(0)
    return float(((found - raw[ACTION]).abs() / spread).mean())


def size(*paths: Path) -> int:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


class Journey:
    """The parts, with what each took."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []

    def add(self, part: str, started: float, *written: Path) -> None:
        """Record a part that began at `started` and wrote these files or directories."""
        self.parts.append({"part": part, "seconds": time.perf_counter() - started, "bytes": size(*written)})
        print(
            f"{part:<44}{self.parts[-1]['seconds']:8.1f} s{self.parts[-1]['bytes'] / 2**20:10.1f} MiB",
            flush=True,
        )

    def command(self, part: str, arguments: list[object], *written: Path, ranks: int = 1) -> None:
        """Run `craft-ds` with these arguments, under torchrun where there are several ranks."""
        program = [sys.executable, "-m"]
        if ranks > 1:
            program += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        ended = subprocess.run(
            [*program, "craft_ds", *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"{part} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
        self.add(part, started, *written)


def main() -> None:
    args = parse_arguments()
    root: Path = args.output
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    journey = Journey()
    old, new, base, teacher = (root / name for name in ("old", "new", "base", "teacher"))
    started = time.perf_counter()
    record(old, TASKS[:2], args.episodes, args.frames, seed=1)
    record(new, TASKS[2:], args.episodes, args.frames, seed=2)
    journey.add("record the data sets (LeRobot, AV1 video)", started, old, new)
    write_base_policy(base, old)
    data = [f"--dataset_repo_id=craft-ds/{part.name}" for part in (old, new)]
    roots = [f"--dataset_root={part}" for part in (old, new)]
    journey.command(
        "statistics",
        ["statistics", f"--policy_path={base}", *data, *roots, f"--output_dir={teacher}"],
        teacher,
    )
    journey.command(
        "data report",
        ["data-report", f"--policy_path={teacher}", *data, *roots, f"--json={root / 'report.json'}"],
    )
    anchors = root / "anchors"
    journey.command(
        "anchors",
        [
            "anchors",
            data[0],
            roots[0],
            f"--policy_path={teacher}",
            f"--output_dir={anchors}",
            f"--num_samples={args.anchors}",
            "--num_workers=1",
            "--heldout_fraction=0.34",
        ],
        anchors,
    )
    run = root / "run"
    flags = [
        "train",
        f"--policy.path={teacher}",
        f"--dataset.repo_id=craft-ds/{new.name}",
        f"--dataset.root={new}",
        "--dataset.video_backend=pyav",
        f"--output_dir={run}",
        "--batch_size=2",
        "--num_workers=1",
        "--log_freq=1",
        f"--save_freq={args.steps // 2}",
        f"--eval_freq={args.steps // 2}",
        "--max_eval_samples=8",
        "--craft.enabled=true",
        f"--craft.anchor_cache_dir={anchors}",
        "--craft.anchor_batch_size=2",
        "--craft.retention_freq=2",
        "--craft.epsilon_relative=true",
        "--craft.epsilon_start=1.3",
        "--craft.epsilon_end=1.1",
        "--resume=auto",
    ]
    journey.command(
        f"train {args.steps // 2} steps, evaluate, save",
        [*flags, f"--steps={args.steps // 2}"],
        run,
        ranks=args.ranks,
    )
    half = run / f"step_{args.steps // 2:06d}"
    if not half.exists():
        (run / "final").rename(half)
    journey.command(
        f"resume, train {args.steps // 2} more, evaluate, save",
        [*flags, f"--steps={args.steps}"],
        run / "final",
        ranks=args.ranks,
    )
    exported = root / "exported"
    journey.command("export", ["export", run / "final", f"--output={exported}"], exported)
    started = time.perf_counter()
    error = perfect_tokens_error(exported, new)
    journey.add("load with LeRobot, decode perfect tokens", started)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/data_s" in row]
    summary = {
        "perfect_tokens_error": error,
        "time_step_s": float(np.median([row["time/step_s"] for row in steps])),
        "time_data_s": float(np.median([row["time/data_s"] for row in steps])),
        "peak_memory_mb": max(row["memory/peak_mb"] for row in rows if "memory/peak_mb" in row),
    }
    print(f"mean error of perfect tokens: {error:.2%} of the range of an action")
    print(f"median step: {summary['time_step_s']:.2f} s, of which data {summary['time_data_s']:.2f} s")
    write_result("bench_realistic", {"hardware": hardware(), "parts": journey.parts, **summary})
    if error > 0.05:
        raise SystemExit("the exported policy decodes perfect tokens wrongly")


if __name__ == "__main__":
    run_main(main)
