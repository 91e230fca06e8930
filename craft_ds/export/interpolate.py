"""Interpolation of a fine-tuned policy with its teacher, weight by weight.

θ = (1 − α)·θ_fine-tuned + α·θ_teacher, as in WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): it regains old
tasks without old data and without training, at the price of the new task.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from craft_ds.anchors.preprocessing import describe_preprocessor, first_difference
from craft_ds.errors import UserError
from craft_ds.lora.adapters import has_adapters
from craft_ds.policies.loading import build_policy, load_policy_config, load_processors, resolve_policy_path
from craft_ds.policies.weights import WeightReader
from craft_ds.tensor_io.tensor_file import ReadRange


@contextmanager
def interpolated(checkpoint: Path, teacher: str, alpha: float) -> Iterator[ReadRange]:
    """Yield a reader of the interpolated weights, by the names of the policy; few of them are in memory.

    Tensors of integers are the checkpoint's own.

    Args:
        checkpoint: The fine-tuned policy.
        teacher: Directory or hub id of a policy of the same architecture, with the same processors.
        alpha: Share of the teacher, in [0, 1].

    Raises:
        UserError: The two cannot be interpolated.
    """
    directory = check_pair(checkpoint, teacher)
    policy = build_policy(load_policy_config(checkpoint), checkpoint)
    with WeightReader(checkpoint, policy) as tuned, WeightReader(directory, policy) as original:

        def read(name: str, start: int, stop: int) -> Tensor:
            values = tuned.read(name, start, stop)
            if not values.is_floating_point():
                return values
            return torch.lerp(values.float(), original.read(name, start, stop).float(), alpha)

        yield read


def check_pair(checkpoint: Path, teacher: str) -> Path:
    """Check that the weights of two policies mean the same; return the directory of the teacher.

    Raises:
        UserError: One holds adapters, or their processors make different tokens.
    """
    directory = resolve_policy_path(teacher)
    for path in (checkpoint, directory):
        if has_adapters(path):
            raise UserError(f"--merge_with: {path} holds LoRA adapters: export it with --merge_lora first")
    _check_same_input(checkpoint, directory)
    return directory


def _check_same_input(checkpoint: Path, teacher: Path) -> None:
    """Check that both preprocessors make the same tokens, so that the weights mean the same."""
    of_teacher, own = (
        describe_preprocessor(load_processors(load_policy_config(path), path)[0])
        for path in (teacher, checkpoint)
    )
    difference = first_difference(of_teacher, own)
    if difference is not None:
        what, there, here = difference
        raise UserError(
            f"--merge_with={teacher}: its preprocessor makes other tokens than {checkpoint}: {what} is "
            f"{there} there and {here} here"
        )
