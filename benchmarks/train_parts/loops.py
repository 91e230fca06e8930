"""Steps of craft-ds without CRaFT against a plain loop of FSDP2 on the same ranks.

Both train the same pi0_fast of 119 M parameters on the same loss and batches, in turn, in the same processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from harness import init_ranks, make_engine, mid_size_config, random_values
from lerobot.policies.pretrained import PreTrainedPolicy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from craft_ds.engines.base import Batch
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.token_loss import PolicyWithLoss, token_loss
from craft_ds.policies.weights import unique_tensors
from craft_ds.policies.wrapping import shard_units
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import task_step
from train_parts.pairs import in_turn, ratio

LEARNING_RATE = 1e-4
Step = Callable[[list[Batch]], Any]


def plain_fsdp(policy: PreTrainedPolicy) -> Step:
    """Return the step of a loop as in PyTorch's tutorial of FSDP2."""
    module = PolicyWithLoss(policy)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in shard_units(policy):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)

    def step(batches: list[Batch]) -> float:
        for batch in batches:
            found = module(batch, call=token_loss)
            loss = found.total / found.count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def with_weights() -> PreTrainedPolicy:
    """Return a policy with random weights on the CPU."""
    policy = meta_policy_without_tokenizers(mid_size_config())
    materialize_(policy, "cpu")
    with torch.no_grad():
        for name, tensor in unique_tensors(policy).items():
            tensor.copy_(random_values(name, 0, tensor.numel()).view_as(tensor))
    return policy


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return the time of a plain step in multiples of ours: above 1, ours is faster."""
    init_ranks("fsdp")
    engine = make_engine("fsdp", meta_policy_without_tokenizers(mid_size_config()), random_values)
    plain = plain_fsdp(with_weights())
    batches = [random_batch(mid_size_config(), case["batch_size"], engine.rank)]
    losses: dict[str, float] = {}

    def of_craft() -> None:
        losses["craft"] = task_step(engine, batches, 1.0).loss

    def of_plain() -> None:
        losses["plain"] = plain(batches)

    times = in_turn({"craft": of_craft, "plain": of_plain}, case["repeats"], before=dist.barrier)
    return {"seconds": times, "losses": losses, "speed": ratio(times["plain"], times["craft"])}
