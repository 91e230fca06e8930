"""Checkpoints: written by all ranks in parallel, already consolidated; each directory appears atomically.

A checkpoint is a LeRobot policy directory with `optimizer.safetensors`, `scheduler.pt`, `craft_state.pt`,
`train_config.json` and `manifest.json`. Parameters and moments are stored by name, in fp32 and in full shape,
so that a run resumes at any world size and in any engine. With LoRA it holds PEFT's two adapter files instead
of `model.safetensors`, and nothing of the base policy.
"""

from craft_ds.checkpoints.load import load_optimizer, read_states
from craft_ds.checkpoints.manifest import read_manifest, verify_checkpoint
from craft_ds.checkpoints.run_directory import complete_checkpoints, step_directory
from craft_ds.checkpoints.save import BackgroundSaver, prepare_checkpoint, save_checkpoint

__all__ = [
    "BackgroundSaver",
    "complete_checkpoints",
    "load_optimizer",
    "prepare_checkpoint",
    "read_manifest",
    "read_states",
    "save_checkpoint",
    "step_directory",
    "verify_checkpoint",
]
