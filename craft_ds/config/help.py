"""The text of `craft-ds train --help`: the flags of craft-ds, then the most used ones of LeRobot."""

import textwrap
from collections.abc import Iterator

from craft_ds.config.describe import describe_flags
from craft_ds.config.presets import PRESETS
from craft_ds.config.unsupported import UNSUPPORTED

LEROBOT_FLAGS = {
    "--policy.path": "policy to fine-tune: a directory or a hub id",
    "--dataset.repo_id": "data set of the new task",
    "--dataset.root": "its local directory; without it, LeRobot's cache and the hub are used",
    "--dataset.episodes": "episodes to train on, such as [0,1,2]; default: all",
    "--dataset.image_transforms.enable": "augment the images (default: false)",
    "--rename_map": "mapping from names of cameras in the data set to those in the policy",
    "--output_dir": "directory of the run; must not exist",
    "--job_name": "name of the run in the logs",
    "--config_path": "YAML or JSON file of flags, or a checkpoint to resume",
    "--resume": "continue the run of --config_path (default: false)",
    "--steps": "optimizer steps (default: 100000)",
    "--batch_size": "samples per rank and micro-batch (default: 8)",
    "--num_workers": "processes per rank that load data (default: 4)",
    "--seed": "seed of the run (default: 1000)",
    "--log_freq": "steps between log lines (default: 200)",
    "--save_checkpoint": "write checkpoints (default: true)",
    "--save_freq": "steps between checkpoints (default: 20000)",
    "--policy.optimizer_lr": "learning rate (default: the policy's)",
    "--policy.scheduler_warmup_steps": "steps of warm-up (default: the policy's)",
    "--policy.scheduler_decay_steps": "steps over which the learning rate falls (default: the policy's)",
    "--use_policy_training_preset": "take optimizer and schedule from the policy (default: true)",
    "--tolerance_s": "largest allowed error of a frame's timestamp in seconds (default: 0.0001)",
    "--wandb.enable": "log to Weights & Biases (default: false)",
    "--wandb.project": "project on Weights & Biases (default: lerobot)",
    "--wandb.mode": "online, offline or disabled",
}
"""The flags of LeRobot that most runs use."""


def train_help() -> str:
    """Return the text of `craft-ds train --help`, without importing torch or LeRobot."""
    return "\n".join(_lines())


def without_refused(text: str) -> str:
    """Return the help text of LeRobot's parser without the flags that craft-ds refuses."""
    kept, refused = [], False
    for line in text.splitlines():
        if line.startswith("  -"):
            name = line.split()[0]
            refused = any(name == flag or name.startswith(f"{flag}.") for flag in UNSUPPORTED)
        elif line and not line.startswith("   "):
            refused = False
        if not refused:
            kept.append(line)
    return "\n".join(kept)


def _lines() -> Iterator[str]:
    yield "usage: craft-ds train --policy.path=DIR --dataset.repo_id=NAME --output_dir=DIR [--FLAG=VALUE ...]"
    yield ""
    yield "Short forms: --engine=NAME (--engine.name), --ds_config FILE (--engine.ds_config),"
    yield "--optimizer.state=FORMAT (--engine.optimizer_state),"
    yield "--lora=PRESET (--lora.enabled=true --lora.preset=PRESET)."
    yield "--craft.preset=NAME stands for the flags of a method, which your own flags replace:"
    for name, preset in PRESETS.items():
        yield f"  {name:<12}{preset.summary}"
    yield "--print_config prints the complete configuration as YAML that --config_path reads, and exits."
    yield "--help=all also lists the other flags of LeRobot, with --policy.type=NAME those of a policy."
    for group in describe_flags():
        yield f"\n{group.title}"
        for entry in group.flags:
            default = f" (default: {entry.default})" if entry.default not in ("", "null", "[]") else ""
            yield from _entry(f"{entry.flag} {entry.type}", f"{entry.line}{default}")
    yield "\nFlags of LeRobot that most runs use"
    for flag, line in LEROBOT_FLAGS.items():
        yield from _entry(flag, line)


def _entry(head: str, line: str) -> Iterator[str]:
    yield f"  {head}"
    yield from textwrap.wrap(line, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
