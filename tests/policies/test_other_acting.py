"""Action chunks of other policies through a sharded engine, on one rank."""

import pytest
import torch
import torch.distributed as dist

from craft_ds.config.configs import FsdpConfig
from craft_ds.distributed.collectives import init_process_group
from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.policies.loading import build_policy, load_policy, load_policy_config
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.policies.token_loss import PolicyWithLoss, token_loss
from craft_ds.policies.weights import WeightReader
from craft_ds.testing.small_policies import OTHER_POLICIES, make_small_policy_dir, pinned_draws, small_sizes

pytestmark = pytest.mark.slow


@pytest.fixture
def group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    init_process_group()
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_a_sharded_policy_acts_as_the_complete_one(name, tmp_path, other_batches, group):
    with small_sizes(), pinned_draws():
        config = load_policy_config(make_small_policy_dir(tmp_path, name))
        batch = other_batches(config, tmp_path)
        with torch.no_grad():
            complete = load_policy(config, tmp_path)
            torch.manual_seed(0)  # diffusers draws noise of its own in every step
            expected = action_chunk(complete, batch)
            loss = token_loss(complete, batch)
        policy = build_policy(config, tmp_path)
        with WeightReader(tmp_path, policy) as weights:
            module = PolicyWithLoss(policy)
            engine = FsdpEngine(
                module, weights.read, lambda: torch.optim.SGD(policy.parameters()), FsdpConfig()
            )
        torch.manual_seed(0)
        assert torch.allclose(engine.act(batch), expected, atol=1e-5)
        # Acting leaves nothing gathered that a later loss would use.
        assert engine.evaluate(batch).total.item() == pytest.approx(loss.total.item(), rel=1e-5)
    assert expected.shape[0] == 4
