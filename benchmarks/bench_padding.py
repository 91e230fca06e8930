"""Count the positions that padding adds to a pass, and what grouping samples by length would save.

python benchmarks/bench_padding.py

A micro-batch is cut to its longest prompt and its longest action sequence. For the demonstrations of each
embedded world, tokenized by the teacher's processors, this counts the positions of the micro-batches of five
epochs:

- none: without any padding, the floor
- random: as `craft-ds train` draws them
- step: the samples of a step sorted by length before they become micro-batches; its gradient is the same
- pool: the samples of 50 micro-batches sorted by length, as Hugging Face's `group_by_length` does: other
  samples share a step

Two kinds of rows: with the teacher's own image tokens, and with the 256 per camera of PaliGemma.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import OUTPUTS, argument_parser, write_result
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE

from craft_ds.cli import run_main
from craft_ds.data.tabular import read_tabular
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.worlds import teacher_directory
from craft_ds.worlds.demonstrations import write_demonstrations
from craft_ds.worlds.recording import Recipe

WAYS = ("none", "random", "step", "pool")
POOL = 50
EPOCHS = 5
PALIGEMMA_TOKENS = 256
"""Image tokens of one camera."""


def token_lengths(world: str, dataset: LeRobotDataset) -> tuple[np.ndarray, int]:
    """Return the lengths of prompt and action tokens of every frame, int (N, 2), and the image tokens."""
    directory = teacher_directory(world)
    config = load_policy_config(directory)
    preprocessor, _ = load_processors(config, directory)
    table = read_tabular(dataset, [OBS_STATE, ACTION])
    tasks, rows = dataset.meta.tasks, np.arange(len(table))
    lengths = []
    for part in np.array_split(rows, -(-len(rows) // 512)):
        chunks = table.chunks(part, config.action_delta_indices)
        batch: dict[str, Any] = {
            OBS_STATE: torch.from_numpy(table.fields[OBS_STATE][part].astype(np.float32)),
            ACTION: torch.from_numpy(table.fields[ACTION][chunks].astype(np.float32)),
            "task": [str(tasks.iloc[task].name) for task in table.task[part]],
        }
        tokens = preprocessor(batch)
        masks = (tokens[OBS_LANGUAGE_ATTENTION_MASK], tokens[ACTION_TOKEN_MASK])
        lengths.append(torch.stack([mask.sum(dim=1) for mask in masks], dim=1).numpy())
    patches = (config.image_resolution[0] // config.vision_patch) ** 2
    return np.concatenate(lengths), patches * len(config.image_features)


def positions(lengths: np.ndarray, order: np.ndarray, size: int, images: int) -> int:
    """Return the positions of all micro-batches of `size` samples; the last action token is not an input."""
    total = 0
    for first in range(0, len(order) - size + 1, size):
        prompt, action = lengths[order[first : first + size]].max(axis=0)
        total += size * (images + int(prompt) + int(action) - 1)
    return total


def count(
    lengths: np.ndarray, images: int, size: int, micro_batches: int, generator: np.random.Generator
) -> dict[str, int]:
    """Return the positions in `EPOCHS` epochs, each way."""
    counted = dict.fromkeys(WAYS, 0)
    step = size * micro_batches
    total = lengths.sum(axis=1)
    for _ in range(EPOCHS):
        order = generator.permutation(len(lengths))
        order = order[: len(order) // step * step]
        counted["none"] += int((images - 1 + total[order]).sum())
        counted["random"] += positions(lengths, order, size, images)
        for way, group in (("step", step), ("pool", size * POOL)):
            groups = np.split(order, range(group, len(order), group))
            ordered = np.concatenate([one[np.argsort(total[one], kind="stable")] for one in groups])
            counted[way] += positions(lengths, ordered, size, images)
    return counted


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--world", nargs="+", choices=("blocks", "metaworld"), default=["blocks", "metaworld"]
    )
    parser.add_argument("--data", type=Path, default=OUTPUTS / "padding", help="recorded here unless present")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--micro_batches", type=int, default=4, help="of a step, over all ranks")
    return parser.parse_args()


def main() -> None:
    args, rows = parse_arguments(), []
    labels = f"{'world':<10}{'data':<5}{'images':>7}{'batch':>6}{'prompt':>9}{'action':>9}"
    print(labels + "".join(f"{way:>9}" for way in WAYS) + "   (positions, relative to random)", flush=True)
    for world in args.world:
        for directory in write_demonstrations(Recipe(world), args.data / world, processes=2):
            config = load_policy_config(teacher_directory(world))
            dataset = LeRobotDataset(directory.name, root=directory)
            lengths, images = token_lengths(world, dataset)
            spans = ["{}-{}".format(*np.quantile(column, [0, 1]).astype(int)) for column in lengths.T]
            for tokens in (images, PALIGEMMA_TOKENS * len(config.image_features)):
                for size in args.batch_size:
                    counted = count(lengths, tokens, size, args.micro_batches, np.random.default_rng(0))
                    cells = "".join(f"{counted[way] / counted['random']:9.3f}" for way in WAYS)
                    head = f"{world:<10}{directory.name:<5}{tokens:>7}{size:>6}{spans[0]:>9}{spans[1]:>9}"
                    print(head + cells, flush=True)
                    rows.append(
                        {"world": world, "data": directory.name, "images": tokens, "batch_size": size}
                        | {"prompt": spans[0], "action": spans[1]}
                        | {"positions": counted}
                    )
    write_result("bench_padding", {**vars(args), "data": str(args.data), "rows": rows})


if __name__ == "__main__":
    run_main(main)
