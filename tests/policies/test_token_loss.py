"""Losses as a sum and a count: any partition of a batch gives the loss of the complete batch."""

import pytest
import torch
from torch import Tensor

from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.small_policies import OTHER_POLICIES, make_small_policy_dir, pinned_draws, small_sizes

# ACT's KL term is a mean over samples, weighted by their action steps.
CASES = {name: {} for name in OTHER_POLICIES} | {
    "act": {"kl_weight": 0.0},
    "diffusion": {"do_mask_loss_for_padding": True, "crop_is_random": False},
}


def part(batch, start, stop):
    return {
        key: value[start:stop] if isinstance(value, Tensor | list) and len(value) == 4 else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_unequal_parts_have_the_loss_of_the_complete_batch(name, tmp_path, other_batches):
    with small_sizes(), pinned_draws(), torch.no_grad():
        make_small_policy_dir(tmp_path, name, **CASES[name])
        policy = load_policy(load_policy_config(tmp_path), tmp_path)
        policy.train()
        batch = other_batches(policy.config, tmp_path)
        assert batch["action_is_pad"].sum(1).unique().numel() > 2
        complete = token_loss(policy, batch)
        parts = [token_loss(policy, part(batch, *span)) for span in ((0, 1), (1, 3), (3, 4))]
        own, *_ = policy.forward(batch)
    total, count = (sum(getattr(loss, field) for loss in parts) for field in ("total", "count"))
    assert count == complete.count
    assert total / count == pytest.approx(float(complete.total / complete.count), rel=1e-5)
    assert float(complete.total / complete.count) == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("name", ["act", "smolvla"])
def test_a_batch_of_padding_counts_nothing(name, tmp_path, other_batches):
    with small_sizes(), torch.no_grad():
        policy = load_policy(load_policy_config(make_small_policy_dir(tmp_path, name)), tmp_path)
        batch = other_batches(policy.config, tmp_path)
        batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
        loss = token_loss(policy, batch)
    assert loss.count == 0
    assert loss.total == 0
