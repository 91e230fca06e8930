"""FSDP2 units of policies without an adapter, on one rank: parameters are sharded tensors there too."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from craft_ds.config.configs import FsdpConfig
from craft_ds.distributed.collectives import init_process_group
from craft_ds.engines.batch_norm import average_running_statistics_, batch_norm_warning
from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.wrapping import shard_units
from craft_ds.testing.policies import read_from


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        raise AssertionError("never called")


class OutsidePolicy(nn.Module):
    """Calls the parts of its layers, as pi0 does with the layers of two decoders."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(10))

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = x + layer.down(torch.tanh(layer.up(layer.norm(x))))
        return x.square().mean(), {}


class ReadingPolicy(OutsidePolicy):
    """Reads a weight of a layer, which is a unit."""

    def forward(self, batch):
        return (batch["x"] @ self.layers[0].up.weight.T).square().mean(), {}


@pytest.fixture
def group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    init_process_group()
    yield
    dist.destroy_process_group()


def engines(policy_class):
    for build in (
        lambda *arguments: SingleEngine(*arguments, torch.device("cpu")),
        lambda *arguments: FsdpEngine(*arguments, FsdpConfig()),
    ):
        policy = policy_class()
        optimizer = lambda policy=policy: torch.optim.SGD(policy.parameters(), lr=0.1)  # noqa: E731
        yield build(PolicyWithLoss(policy), read_from(policy), optimizer)


def test_a_unit_whose_parts_are_called_from_outside_is_gathered(group):
    assert len(shard_units(OutsidePolicy())) == 10
    batch = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))}
    outcomes = []
    for engine in engines(OutsidePolicy):
        seen = []
        for _ in range(3):
            loss = engine.forward(batch)
            engine.backward(loss.total, last=True)
            seen += [loss.total.item(), sum(float(part.square().sum()) for part in engine.gradient())]
            engine.step()
            seen.append(float(engine.evaluate(batch).total))
        outcomes.append(seen)
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-5)
    assert outcomes[0][0] != pytest.approx(outcomes[0][-1], rel=1e-2)


def test_a_weight_that_is_read_is_one_line(group):
    _, engine = engines(ReadingPolicy)
    with pytest.raises(UserError, match=r"ReadingPolicy reads the weight .* --ds_config=zero2") as raised:
        engine.forward({"x": torch.ones(2, 6)})
    assert "\n" not in str(raised.value)


def test_batch_norm_is_warned_of_on_several_ranks_only(group):
    untracked = nn.BatchNorm2d(4, track_running_stats=False)
    policy = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), untracked)
    assert batch_norm_warning(policy, 2).startswith("2 batch normalisations use")
    assert batch_norm_warning(policy, 1) is None
    assert batch_norm_warning(nn.Linear(2, 2), 2) is None
    policy[1].running_mean.fill_(0.5)
    average_running_statistics_(policy)
    assert policy[1].running_mean.eq(0.5).all()
