"""Export: a checkpoint as a policy directory that stock LeRobot loads.

A checkpoint is consolidated already, so this copies it without the training state, in the dtype that
is asked for, a few megabytes at a time: no model is built and no GPU is needed.
"""

import math
import shutil
from pathlib import Path

import torch

from craft_ds.checkpoint import verify_checkpoint
from craft_ds.errors import UserError
from craft_ds.policies.directory import WEIGHTS, copy_policy_files
from craft_ds.tensor_file import TensorFile, TensorSpec, create_tensor_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK = 1 << 24


def export_checkpoint(checkpoint: Path, output: Path, dtype: str = "float32") -> None:
    """Write a checkpoint's policy to a directory of its own.

    Args:
        checkpoint: `outputs/run/step_001000` or `outputs/run/final`.
        output: The directory to make; must not exist.
        dtype: Of the floating-point weights in the file: `float32` (as trained), `bfloat16` or
            `float16`. LeRobot casts them to the dtype of the policy's config when it loads them.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or the output exists.
    """
    if output.exists():
        raise UserError(f"--output={output} exists already: choose another or move it away")
    verify_checkpoint(checkpoint, rank=0, world_size=1)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy_policy_files(checkpoint, temporary, output)
    _convert(checkpoint / WEIGHTS, temporary / WEIGHTS, DTYPES[dtype])
    temporary.rename(output)


def _convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    with TensorFile(source) as reader:
        specs = [
            TensorSpec(name, shape, dtype if stored.is_floating_point else stored)
            for name, shape, stored in reader.specs()
        ]
        create_tensor_file(target, specs, {"format": "pt"})
        with TensorFile(target, writable=True) as writer:
            for spec in specs:
                count = math.prod(spec.shape)
                for start in range(0, count, _BLOCK):
                    stop = min(start + _BLOCK, count)
                    writer.write(spec.name, start, reader.read(spec.name, start, stop))
            writer.sync()
