"""The trimmed token-weighted loss against LeRobot's own."""

import pytest
import torch
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import nn

from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.loss import supervised_logits
from craft_ds.policies.token_loss import PolicyWithLoss, TokenLoss, token_loss
from craft_ds.testing.policies import make_test_policy_dir, random_batch


@pytest.fixture(scope="module", params=[1, 2], ids=["one_camera", "two_cameras"])
def policy(request, tmp_path_factory):
    path = make_test_policy_dir(tmp_path_factory.mktemp("policy"), seed=1, cameras=request.param)
    return load_policy(load_policy_config(path), path)


def uneven_batch(config):
    """Very different lengths, a row with one action token, and a row of nothing but padding."""
    batch = random_batch(config, batch_size=6, seed=3)
    prompt_length, action_length = config.tokenizer_max_length - 5, config.max_action_tokens - 3
    batch[OBS_LANGUAGE_ATTENTION_MASK] = (
        torch.arange(config.tokenizer_max_length) < torch.tensor([prompt_length, 7, 30, 21, 1, 0])[:, None]
    )
    batch[ACTION_TOKEN_MASK] = (
        torch.arange(config.max_action_tokens) < torch.tensor([action_length, 2, 10, 5, 1, 0])[:, None]
    )
    return batch


def reference(policy, batch):
    """LeRobot's mean times its own count, and the gradient."""
    policy.zero_grad()
    mean, _ = policy.forward(batch)
    total = mean * batch[ACTION_TOKEN_MASK][:, 1:].sum()
    total.backward()
    return total.detach(), [p.grad for p in policy.parameters()]


def ours(policy, batch):
    policy.zero_grad()
    loss = token_loss(policy, batch)
    loss.total.backward()
    return loss, [p.grad for p in policy.parameters()]


def distance(gradients, expected):
    flat, other = (
        torch.cat([torch.zeros(1) if g is None else g.double().flatten() for g in gs])
        for gs in (gradients, expected)
    )
    return ((flat - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    "make_batch", [uneven_batch, lambda c: random_batch(c, 4, seed=0)], ids=["uneven", "plain"]
)
def test_equals_lerobot_in_loss_and_gradient(policy, make_batch):
    batch = make_batch(policy.config)
    expected, expected_gradients = reference(policy, batch)
    loss, gradients = ours(policy, batch)
    assert loss.count.item() == batch[ACTION_TOKEN_MASK][:, 1:].sum()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert distance(gradients, expected_gradients) <= 1e-6
    assert [g is None for g in gradients] == [g is None for g in expected_gradients]


def test_equals_lerobot_in_fp64(policy):
    policy = policy.double()
    try:
        batch = uneven_batch(policy.config)
        expected, expected_gradients = reference(policy, batch)
        loss, gradients = ours(policy, batch)
        assert loss.total.dtype == torch.float64
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert distance(gradients, expected_gradients) <= 1e-6
    finally:
        policy.float()


def test_bf16_weights_give_an_fp32_loss_close_to_lerobots(policy):
    policy = policy.bfloat16()
    try:
        batch = uneven_batch(policy.config)
        expected, expected_gradients = reference(policy, batch)
        loss, gradients = ours(policy, batch)
        assert loss.total.dtype == torch.float32
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-2)
        assert distance(gradients, expected_gradients) <= 3e-2
    finally:
        policy.float()


def test_a_batch_without_supervised_tokens_has_a_zero_gradient(policy):
    batch = random_batch(policy.config, 3, seed=0)
    batch[ACTION_TOKEN_MASK] = torch.arange(policy.config.max_action_tokens).repeat(3, 1) < 1
    loss, gradients = ours(policy, batch)
    assert loss.total.item() == 0.0
    assert loss.count.item() == 0.0
    assert all(g is None or not g.any() for g in gradients)


def test_the_sum_over_samples_is_the_loss_of_the_batch(policy):
    batch = random_batch(policy.config, 4, seed=5)
    complete = token_loss(policy, batch)
    parts = [token_loss(policy, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    assert sum(p.count for p in parts) == complete.count
    assert sum(p.total for p in parts).item() == pytest.approx(complete.total.item(), rel=1e-5)


def test_lm_head_and_decoder_see_only_what_they_need(policy):
    config = policy.config
    batch = uneven_batch(config)
    rows, lengths, calls, last = [], [], [], []
    gemma = policy.model.paligemma_with_expert.paligemma
    hooks = [
        gemma.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0])),
        gemma.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        gemma.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1)),
        gemma.model.language_model.layers[-1].mlp.register_forward_pre_hook(
            lambda _, args: last.append(args[0].shape[1])
        ),
    ]
    loss = token_loss(policy, batch)
    for hook in hooks:
        hook.remove()
    cameras = len(config.image_features)
    assert rows == [int(loss.count)]
    assert lengths == [16 * cameras + config.tokenizer_max_length - 5 + config.max_action_tokens - 3 - 1]
    assert calls == [1]
    assert last == [config.max_action_tokens - 3 - 1]


@pytest.mark.parametrize("policy", [2], indirect=True)
def test_an_absent_camera_counts_as_in_lerobot(policy):
    batch = random_batch(policy.config, 4, seed=0)
    del batch["observation.images.side1"]
    expected, expected_gradients = reference(policy, batch)
    loss, gradients = ours(policy, batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert distance(gradients, expected_gradients) <= 1e-6


def test_gradient_checkpointing_changes_nothing(policy):
    batch = random_batch(policy.config, 3, seed=2)
    policy.train()
    loss, gradients = ours(policy, batch)
    policy.model.gradient_checkpointing_enable()
    checkpointed, again = ours(policy, batch)
    policy.model.gradient_checkpointing_disable()
    policy.eval()
    assert checkpointed.total.item() == pytest.approx(loss.total.item(), rel=1e-6)
    assert distance(again, gradients) <= 1e-6


def test_the_wrapper_calls_the_adapter_and_names_the_policy(policy):
    wrapper = PolicyWithLoss(policy)
    batch = random_batch(policy.config, 2, seed=0)
    assert isinstance(wrapper(batch), TokenLoss)
    assert torch.equal(wrapper(batch).total, token_loss(policy, batch).total)
    assert {name.split(".")[0] for name, _ in wrapper.named_parameters()} == {"policy"}


def test_a_policy_without_an_adapter_counts_samples():
    class Plain(nn.Module):
        def forward(self, batch):
            return batch["x"].mean(), {}

    loss = token_loss(Plain(), {"task": ["a"], "x": torch.tensor([1.0, 2.0, 6.0])})
    assert (loss.total.item(), loss.count.item()) == (9.0, 3.0)


def test_tokens_on_padding_do_not_matter(policy):
    batch = random_batch(policy.config, 4, seed=0)
    noisy = dict(batch)
    for tokens, mask in (
        (ACTION_TOKENS, ACTION_TOKEN_MASK),
        (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK),
    ):
        noisy[tokens] = torch.where(batch[mask], batch[tokens], 9)
    assert token_loss(policy, noisy).total.item() == pytest.approx(
        token_loss(policy, batch).total.item(), rel=1e-6
    )


def test_logits_are_of_the_supervised_tokens_sample_by_sample(policy):
    batch = uneven_batch(policy.config)
    logits, targets = supervised_logits(policy, batch)
    assert torch.equal(targets, batch[ACTION_TOKENS][:, 1:][batch[ACTION_TOKEN_MASK][:, 1:]])
    assert logits.shape == (len(targets), policy.config.vocab_size)
    alone = {key: value[:1] for key, value in batch.items()}
    torch.testing.assert_close(
        supervised_logits(policy, alone)[0], logits[: batch[ACTION_TOKEN_MASK][0].sum() - 1]
    )
