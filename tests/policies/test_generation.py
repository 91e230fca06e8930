"""Greedy action chunks against LeRobot's own, and that ranks decode until the last has finished."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import nn

import craft_ds.policies.pi0_fast.generation as generation
import craft_ds.worlds
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.generation import action_chunk, greedy_action_tokens
from craft_ds.policies.token_loss import PolicyWithLoss, token_loss
from craft_ds.testing.policies import make_test_policy_dir, random_batch
from craft_ds.worlds.base import CAMERA, STATE

TEACHER = Path(craft_ds.worlds.__file__).parent / "assets" / "metaworld_teacher"


@pytest.fixture(scope="module", params=[1, 2], ids=["one_camera", "two_cameras"])
def policy(request, tmp_path_factory):
    """Random weights: never ends an action, but for chance."""
    path = make_test_policy_dir(tmp_path_factory.mktemp("policy"), seed=1, cameras=request.param)
    policy = load_policy(load_policy_config(path), path)
    policy.config.validate_action_token_prefix = False
    return policy


@pytest.fixture(scope="module")
def teacher():
    config = load_policy_config(TEACHER)
    return load_policy(config, TEACHER)


@pytest.fixture(scope="module")
def observations():
    """Return noise images for all tasks, whose prompts have different lengths; needs no simulator."""
    preprocessor, _ = load_processors(load_policy_config(TEACHER), TEACHER)
    texts = ["Press a button from the top", "Push and close a drawer", "Rotate the faucet clockwise"]
    noise = torch.Generator().manual_seed(0)
    return preprocessor(
        {
            CAMERA: torch.rand(12, 3, 64, 64, generator=noise),
            STATE: torch.tensor([0.0, 0.6, 0.2, 0.5]) + 0.2 * torch.rand(12, 4, generator=noise),
            "task": texts * 4,
        }
    )


def lerobot_tokens(policy, batch):
    """LeRobot's, with zeros after the end of each sample instead of what it still says then."""
    images, masks = policy._preprocess_images(batch)
    tokens = policy.model.sample_actions_fast_kv_cache(
        images,
        masks,
        batch[OBS_LANGUAGE_TOKENS],
        batch[OBS_LANGUAGE_ATTENTION_MASK],
        max_decoding_steps=policy.config.max_decoding_steps,
    )
    ended = (tokens == end_of_action(policy)).cumsum(dim=1)
    return tokens * (ended - (tokens == end_of_action(policy)).long() == 0)


def end_of_action(policy):
    return policy._paligemma_tokenizer.convert_tokens_to_ids("|")


def rows(batch, chosen):
    return {key: value[chosen] for key, value in batch.items() if isinstance(value, torch.Tensor)}


def test_the_teachers_tokens_and_actions_are_lerobots(teacher, observations):
    tokens = greedy_action_tokens(teacher, observations)
    lengths = (tokens == end_of_action(teacher)).int().argmax(dim=1)
    assert len(lengths.unique()) > 1  # they end at different lengths, and end
    assert lengths.min() > 0
    assert torch.equal(tokens, lerobot_tokens(teacher, observations))
    assert torch.equal(action_chunk(teacher, observations), teacher.predict_action_chunk(observations))


def test_random_weights_decode_as_in_lerobot(policy):
    batch = random_batch(policy.config, 6, seed=3)
    tokens = greedy_action_tokens(policy, batch)
    assert len(tokens.unique(dim=0)) > 1
    assert torch.equal(tokens, lerobot_tokens(policy, batch))
    assert torch.equal(action_chunk(policy, batch), policy.predict_action_chunk(batch))


@pytest.mark.parametrize("policy", [2], indirect=True)
def test_an_absent_camera_counts_as_in_lerobot(policy):
    batch = random_batch(policy.config, 4, seed=0)
    del batch["observation.images.side1"]
    assert torch.equal(greedy_action_tokens(policy, batch), lerobot_tokens(policy, batch))


def test_padding_and_the_other_samples_do_not_matter(policy):
    batch = random_batch(policy.config, 4, seed=5)
    chunks = action_chunk(policy, batch)
    noisy = dict(batch)
    mask = batch[OBS_LANGUAGE_ATTENTION_MASK]
    noisy[OBS_LANGUAGE_TOKENS] = torch.where(mask, batch[OBS_LANGUAGE_TOKENS], 9)
    torch.testing.assert_close(action_chunk(policy, noisy), chunks)
    for sample in range(4):
        alone = action_chunk(policy, rows(batch, slice(sample, sample + 1)))
        torch.testing.assert_close(alone, chunks[sample : sample + 1])


def test_bf16_weights_act_close_to_fp32(teacher, observations):
    expected = action_chunk(teacher, observations)
    teacher.bfloat16()
    try:
        found = action_chunk(teacher, observations)
    finally:
        teacher.float()
    # Rounding decides between tokens that are nearly as probable: LeRobot's own decoding differs as often.
    assert ((found - expected).abs().mean(dim=(1, 2)) > 0.01).sum() <= len(found) // 6


def test_the_vision_tower_runs_once_and_the_head_on_one_position(policy):
    batch = random_batch(policy.config, 3, seed=0)
    gemma, calls, heads, lengths, last = policy.model.paligemma_with_expert.paligemma, [], [], [], []
    hooks = [
        gemma.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1)),
        gemma.lm_head.register_forward_pre_hook(lambda _, args: heads.append(tuple(args[0].shape))),
        gemma.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        gemma.model.language_model.layers[-1].mlp.register_forward_pre_hook(
            lambda _, args: last.append(args[0].shape[1])
        ),
    ]
    greedy_action_tokens(policy, batch)
    for hook in hooks:
        hook.remove()
    longest = int(batch[OBS_LANGUAGE_ATTENTION_MASK].sum(dim=1).max())
    assert calls == [1]
    assert set(heads) == {(3, 32)}
    assert lengths[0] == 16 * len(policy.config.image_features) + longest + 1
    assert set(lengths[1:]) == set(last) == {1}


def test_a_rank_goes_on_until_all_have_finished(teacher, observations, monkeypatch):
    """Each decoder call gathers a sharded decoder: a rank that made fewer would leave the others waiting."""
    expected = greedy_action_tokens(teacher, observations)
    longest = int((expected != 0).sum(dim=1).max())
    asked, decoder_calls = [], []

    def others_need_three_more(finished):
        asked.append(bool(finished))
        return len(asked) == longest + 3

    monkeypatch.setattr(generation, "_on_all_ranks", others_need_three_more)
    decoder = teacher.model.paligemma_with_expert.paligemma.model.language_model
    hook = decoder.register_forward_pre_hook(lambda *_: decoder_calls.append(1))
    tokens = greedy_action_tokens(teacher, observations)
    hook.remove()
    assert len(decoder_calls) == longest + 3
    assert asked == [False] * (longest - 1) + [True] * 4
    assert torch.equal(tokens, expected)


def test_a_policy_without_the_prefix_raises_no_error(policy):
    policy.config.validate_action_token_prefix = True
    batch = random_batch(policy.config, 2, seed=0)
    with pytest.raises(AssertionError, match="does not start with"):
        policy.predict_action_chunk(batch)
    assert action_chunk(policy, batch).isfinite().all()
    assert policy.config.validate_action_token_prefix  # and is as strict as before
    policy.config.validate_action_token_prefix = False


def test_other_policies_act_by_their_own_method():
    class Plain(nn.Module):
        config = SimpleNamespace()

        def predict_action_chunk(self, batch):
            return batch["x"] * 2

    module, batch = PolicyWithLoss(Plain()), {"x": torch.ones(2, 3, 1)}
    assert torch.equal(module(batch, call=action_chunk), torch.full((2, 3, 1), 2.0))


def test_acting_does_not_change_the_loss(policy):
    batch = random_batch(policy.config, 3, seed=1)
    policy.train()
    expected = token_loss(policy, batch).total.item()
    chunk = action_chunk(policy, batch)
    assert not chunk.requires_grad
    assert not policy.training
    policy.train()
    assert token_loss(policy, batch).total.item() == expected
