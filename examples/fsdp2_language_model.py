"""CRaFT in a plain FSDP2 loop: a small language model learns new sequences without losing the old ones.

torchrun --nproc-per-node 2 examples/fsdp2_language_model.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from craft_ds import CraftConfig
from craft_ds.algorithm import GramTriple, ascend, gram, merge, merge_

STEPS, EPSILON = 60, 0.01
OLD, NEW = range(16, 32), range(16)  # tokens; a text counts upwards within its own


def loss_of(model: nn.Module, words: range, step: int) -> Tensor:
    """Return the mean next-token loss on 8 random lines of 16 tokens that count upwards within `words`."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    start = torch.randint(len(words), (8, 1), generator=generator)
    tokens = words.start + (start + torch.arange(16)) % len(words)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def shards(model: nn.Module) -> list[Tensor]:
    """Return this rank's shards of the gradient."""
    return [parameter.grad.to_local() for parameter in model.parameters()]


dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
for part in (*model, model):
    fully_shard(part)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(STEPS):  # the old task
    loss_of(model, OLD, step).backward()
    optimizer.step()
    optimizer.zero_grad()

craft, multiplier = CraftConfig(enabled=True, lambda_lr=1.0), 1.0
for step in range(STEPS):  # the new task, subject to L_ret ≤ ε
    task = loss_of(model, NEW, step)
    task.backward()
    g_t = shards(model)
    optimizer.zero_grad()  # sets every .grad to None: g_t keeps the shards
    retention = loss_of(model, OLD, step)
    retention.backward()
    g_r = shards(model)
    # The only communication of surgery: three products and two losses.
    scalars = torch.cat([gram(g_t, g_r), torch.stack([task, retention]).detach() / dist.get_world_size()])
    dist.all_reduce(scalars)
    tt, tr, rr, task_loss, retention_loss = scalars.tolist()
    merged = merge(GramTriple(tt, tr, rr), multiplier, craft)
    merge_(g_r, g_t, merged.a, merged.b)  # in place, where the optimizer reads it: g_r ← a·g_t + b·g_r
    optimizer.step()
    optimizer.zero_grad()
    multiplier = ascend(multiplier, retention_loss, EPSILON, craft)
    if dist.get_rank() == 0 and step % 10 == 9:
        print(f"step {step + 1} | loss={task_loss:.3f} | L_ret={retention_loss:.3f} | λ={multiplier:.2f}")
dist.destroy_process_group()
