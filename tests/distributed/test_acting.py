"""A sharded policy acts like the unsharded one, without an effect on training."""

import pytest
import torch
from registry import every
from scenarios_acting import SCENES, TEACHER, scene

from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.generation import greedy_action_tokens


@pytest.fixture(scope="module")
def lengths():
    """Return the lengths of the actions of each scene's samples, in tokens."""
    teacher = load_policy(load_policy_config(TEACHER), TEACHER)
    return {seed: (greedy_action_tokens(teacher, scene(seed)) != 0).sum(dim=1) for seed in SCENES}


@every("acting")
def test_chunks_are_those_of_one_process(ranks, reference, name):
    found, expected = ranks[name].tensors, reference[name].tensors
    chunks = [key for key in expected if key.startswith("chunks/")]
    assert len(chunks) == 6 * len(SCENES)
    for key in chunks:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0)


@every("acting")
def test_ranks_whose_actions_end_earlier_decode_on(ranks, name, lengths):
    longest = lengths[SCENES[0]]
    own = [int(longest[rank :: ranks.world_size].max()) for rank in range(ranks.world_size)]
    assert len(set(own)) > 1  # alone, they would stop at different tokens
    assert [values[f"tokens{SCENES[0]}"] for values in ranks[name].values] == [max(own)] * ranks.world_size


@every("acting")
def test_a_training_step_after_acting_is_the_same_bit_by_bit(ranks, name):
    found = ranks[name].tensors
    trained = [key for key in found if key.startswith("only trained/")]
    assert trained
    for key in trained:
        assert torch.equal(found[key], found[key.replace("only trained", "acted")]), key
