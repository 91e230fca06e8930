"""Count bytes and FLOPs of one forward and backward pass of the full-size pi0_fast, LeRobot's and ours.

    python benchmarks/bench_pass_memory.py

Tensors have no storage, so that the figures are exact and the same on every machine. Bytes are the peak
beside parameters and accumulated gradients; one gradient at a time is counted while it is computed. FLOPs are
those of matrix products and attention (`torch.utils.flop_counter`). 80 of 200 prompt tokens and 100 of 256
action tokens are not padding.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import argument_parser, as_in_lerobot_, write_result
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from craft_ds.cli import run_main
from craft_ds.engines.base import Batch
from craft_ds.memory_planner.shapes import (
    Workload,
    fake_batch,
    meta_policy_without_tokenizers,
    to_fake_,
    with_cameras,
)
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.lerobot_internals import preprocess_images
from craft_ds.policies.token_loss import token_loss

CAMERAS = {"1 of 1": (1, 1), "1 of 3": (3, 1), "3 of 3": (3, 3)}


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=8, help="samples (default: 8)")
    return parser.parse_args()


def lerobots_loss(policy: PI0FastPolicy, batch: Batch) -> Tensor:
    """Return the loss as `PI0FastPolicy.forward` does, which also reads its value."""
    images, masks = preprocess_images(policy, batch)
    names = OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK, ACTION_TOKENS, ACTION_TOKEN_MASK
    return policy.model.forward(images, masks, *(batch[name] for name in names))["loss"]


def our_loss(policy: PI0FastPolicy, batch: Batch) -> Tensor:
    return token_loss(policy, batch).total


class Costs(NamedTuple):
    """Costs of a pass."""

    peak_bytes: int
    flops: int


def costs(
    loss: Callable[[PI0FastPolicy, Batch], Tensor], dtype: torch.dtype, workload: Workload, present: int
) -> Costs:
    """Return the costs of a pass with weights of a dtype and images of the first `present` cameras."""
    config = with_cameras(PI0FastConfig(), workload.cameras)
    policy = meta_policy_without_tokenizers(config).train()
    assert isinstance(policy, PI0FastPolicy)
    if loss is lerobots_loss:
        as_in_lerobot_(policy)

    def discard(parameter: Tensor) -> None:
        parameter.grad = None

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        to_fake_(policy, dtype, dtype)
    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(discard)
    batch = fake_batch(config, workload, fake)
    for camera in list(config.image_features)[present:]:
        del batch[camera]
    with FlopCounterMode(display=False) as flops, MemoryCounter() as memory:
        loss(policy, batch).backward()
    return Costs(memory.peak, flops.get_total_flops())


def main() -> None:
    args = parse_arguments()
    result: dict[str, Any] = {"batch_size": args.batch_size}
    print("| cameras | dtype | LeRobot | craft-ds | ratio | TFLOP: LeRobot | craft-ds | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (cameras, present) in CAMERAS.items():
        for dtype in (torch.float32, torch.bfloat16):
            theirs, ours = (
                costs(loss, dtype, Workload(args.batch_size, prompt, action, cameras), present)
                for loss, prompt, action in ((lerobots_loss, 200, 256), (our_loss, 80, 100))
            )
            kind = str(dtype).removeprefix("torch.")
            result[f"{name}, {kind}"] = {"lerobot": theirs._asdict(), "craft_ds": ours._asdict()}
            sizes = [f"{each.peak_bytes / 2**30:.2f} GiB" for each in (theirs, ours)]
            flops = [f"{each.flops / 1e12:.1f}" for each in (theirs, ours)]
            row = [*sizes, f"{ours.peak_bytes / theirs.peak_bytes:.2f}"]
            row += [*flops, f"{theirs.flops / ours.flops:.2f}"]
            print(f"| {name} | {kind} | {' | '.join(row)} |", flush=True)
    write_result("pass_memory", result)


if __name__ == "__main__":
    run_main(main)
