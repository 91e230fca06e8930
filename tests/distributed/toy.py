"""A small policy with every kind of parameter that is hard to shard."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craft_ds.policies.pi0_fast.retention import TASK_INDEX, LossTerms
from craft_ds.policies.token_loss import TokenLoss, token_loss
from craft_ds.policies.wrapping import shard_units

INPUT, LENGTH, CLASSES, SAMPLES = 5, 6, 3, 12
TASKS = 3


class Table(nn.Module):
    """A single parameter in its own module, so that ZeRO-3 gathers it on use."""

    def __init__(self, *shape: int):
        super().__init__()
        self.values = nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self) -> Tensor:
        # A view, so that it carries a gradient hook like any other output.
        return self.values * 1.0


class ToyPolicy(nn.Module):
    """Token classifier. No size is divisible by 2 and 3, and two parameters are smaller than 3 ranks."""

    def __init__(self, width: int = 7, inner: int = 13, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Linear(INPUT, width)  # 7x5
        self.scale = Table(1)  # empty on all ranks but one
        self.pair = Table(2)  # empty on the last of three ranks
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, 11, bias=False)  # 11x13
        self.head = nn.Linear(11, CLASSES)
        self.task_only = nn.Linear(11, CLASSES)
        self.retention_only = nn.Linear(11, CLASSES)
        self.unused = Table(5)
        self.frozen = nn.Linear(INPUT, INPUT).requires_grad_(False)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(self.head.weight.dtype)
        hidden = torch.tanh(self.trunk(x + self.frozen(x))) * self.scale()
        pair = self.pair()
        hidden = torch.cat([hidden[..., :2] * pair, hidden[..., 2:]], dim=-1)
        hidden = torch.tanh(self.outer(torch.tanh(self.inner(hidden))))
        own = self.retention_only if bool(batch["retention"]) else self.task_only
        return self.head(hidden) + own(hidden)


class TiedPolicy(nn.Module):
    """Two modules share one weight; a buffer is stored with the weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Linear(INPUT, 7, bias=False)
        self.again = nn.Linear(INPUT, 7)
        self.again.weight = self.trunk.weight
        self.head = nn.Linear(7, CLASSES)
        self.register_buffer("shift", torch.arange(INPUT) / INPUT)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].to(self.head.weight.dtype)
        shift = self.shift.to(x.dtype)
        return self.head(torch.tanh(self.trunk(x)) * torch.tanh(self.again(x.flip(-1) + shift)))


@shard_units.register
def _toy_units(policy: ToyPolicy) -> list[nn.Module]:
    """Return all units except `pair`, `head` and `frozen`, which belong to the root."""
    return [
        policy.trunk,
        policy.scale,
        policy.inner,
        policy.outer,
        policy.task_only,
        policy.retention_only,
        policy.unused,
    ]


@token_loss.register(ToyPolicy)
@token_loss.register(TiedPolicy)
def _toy_loss(policy: ToyPolicy | TiedPolicy, batch: dict[str, Tensor]) -> TokenLoss:
    logits, mask = policy.logits(batch), batch["mask"]
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch["y"].flatten(), reduction="none")
    return TokenLoss((losses * mask.flatten()).sum(), mask.float().sum())


def toy_loss_by_task(policy: ToyPolicy, batch: dict[str, Tensor]) -> TokenLoss:
    """Return the sums of `_toy_loss` by task, (`TASKS`,) each."""
    logits, mask = policy.logits(batch).float(), batch["mask"]
    values = F.cross_entropy(logits[mask], batch["y"][mask], reduction="none")
    return LossTerms(values, mask.nonzero()[:, 0]).sum_by(batch[TASK_INDEX], TASKS)


def samples(step: int, *, retention: bool) -> dict[str, Tensor]:
    """Return the global batch of a step. Samples have 0 to 6 tokens; anchors contradict the task's labels."""
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, LENGTH, INPUT, generator=rng)
    y = (x[..., 0] > 0).long() + (x[..., 1] > 0.5).long()
    lengths = torch.randint(0, LENGTH + 1, (SAMPLES, 1), generator=rng)
    lengths[1::6] = 0  # rank 1 of 2 and of 3 has far fewer tokens than rank 0
    lengths[0::6] = LENGTH
    if retention:
        x, y = x + 0.1 * torch.randn(x.shape, generator=rng), (y + 1) % CLASSES
    # All anchors of task 1 are on the first rank.
    tasks = torch.tensor([1, 0, 2, 2, 2, *[0] * (SAMPLES - 5)])
    return {
        TASK_INDEX: tasks,
        "x": x,
        "y": y,
        "mask": torch.arange(LENGTH) < lengths,
        "retention": torch.tensor(retention),
    }


def deal(
    batch: dict[str, Tensor], accumulation: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's micro-batches of a global batch; together the ranks have each sample once."""
    for micro in range(accumulation):
        yield {
            key: value[micro::accumulation][rank::world_size] if value.ndim else value
            for key, value in batch.items()
        }
