"""Retention losses against their formulas, sample by sample and in fp64."""

import pytest
import torch
import torch.nn.functional as F
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS

from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast import retention
from craft_ds.policies.pi0_fast.generation import greedy_action_tokens
from craft_ds.policies.pi0_fast.loss import supervised_hidden, supervised_logits
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, TASK_INDEX, TOP, by_task
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.policies import random_batch

OF_THE_TEACHER = [name for name, loss in RETENTION_LOSSES.items() if loss.targets is not None]


@pytest.fixture
def policy(policy_dir):
    return load_policy(load_policy_config(policy_dir), policy_dir)


@pytest.fixture
def student(policy_dir):
    """The same policy after a change of every parameter."""
    policy = load_policy(load_policy_config(policy_dir), policy_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def anchors(policy, name, batch_size=5, seed=0):
    batch = random_batch(policy.config, batch_size, seed)
    return batch | to_policy_batch(RETENTION_LOSSES[name].targets(policy, batch), "cpu")


@pytest.mark.parametrize("name", ["teacher_kl", "hidden"])
def test_the_teachers_own_loss_is_zero_and_grows_with_the_distance(policy, student, name):
    batch = anchors(policy, name)
    own, other = (RETENTION_LOSSES[name].loss(each, batch) for each in (policy, student))
    assert abs(own.total.item() / own.count.item()) < 1e-6
    assert other.total.item() / other.count.item() > 1e-3
    assert RETENTION_LOSSES[name].zero_for_teacher


@pytest.mark.parametrize("name", OF_THE_TEACHER)
def test_sums_and_counts_of_single_samples_are_those_of_the_batch(policy, student, name):
    """Padding, and the longest sample of a batch, must not matter."""
    batch, loss = anchors(policy, name), RETENTION_LOSSES[name].loss
    together = loss(student, batch)
    singles = [loss(student, {key: value[i : i + 1] for key, value in batch.items()}) for i in range(5)]
    assert sum(one.count.item() for one in singles) == together.count.item()
    assert sum(one.total.item() for one in singles) == pytest.approx(together.total.item(), rel=1e-5)


def test_the_divergence_is_that_of_the_bucketed_distributions(policy, student):
    batch = anchors(policy, "teacher_kl")
    found = RETENTION_LOSSES["teacher_kl"].loss(student, batch)
    with torch.no_grad():
        p, q = (supervised_logits(each, batch)[0].double().softmax(dim=1) for each in (policy, student))
    top = p.topk(TOP, dim=1).indices

    def bucketed(shares):
        shares = shares.gather(1, top)
        return torch.cat([shares, 1 - shares.sum(dim=1, keepdim=True)], dim=1)

    expected = (bucketed(p) * (bucketed(p) / bucketed(q)).log()).sum()
    assert found.count.item() == len(p) == batch[ACTION_TOKEN_MASK][:, 1:].sum().item()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() < (p * (p / q).log()).sum().item() * (1 + 1e-9)  # never more than the complete one


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
def test_gradients_of_the_divergence_are_finite_for_certain_teachers(sharpness):
    """A teacher that is certain of a token leaves nothing for the rest."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * sharpness
    ids = logits.topk(TOP, dim=1).indices
    log_p = retention._with_rest(logits.log_softmax(dim=1).gather(1, ids))
    student = (logits + 0.5).roll(1, dims=1).requires_grad_()
    log_q = retention._with_rest(student.log_softmax(dim=1).gather(1, ids))
    assert log_p.isfinite().all()
    (log_p.exp() * (log_p - log_q)).sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    if sharpness == 1.0:
        q = student.detach().double().softmax(dim=1)
        p = logits.double().softmax(dim=1)
        rest = torch.ones_like(q, dtype=torch.bool).scatter(1, ids, False)
        share = (p * rest).sum(1, keepdim=True) / (q * rest).sum(1, keepdim=True)
        expected = q - torch.where(rest, q * share, p)
        torch.testing.assert_close(student.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_hidden_is_the_relative_distance_of_means(policy, student):
    batch = anchors(policy, "hidden")
    found = RETENTION_LOSSES["hidden"].loss(student, batch)
    total = 0.0
    for i in range(5):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        with torch.no_grad():
            wanted, mean = (
                supervised_hidden(each, one).hidden.double().mean(dim=0) for each in (policy, student)
            )
        total += ((mean - wanted).square().sum() / wanted.square().sum()).item()
    assert found.count.item() == 5
    assert found.total.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", OF_THE_TEACHER)
def test_a_sample_without_supervised_tokens_adds_nothing(policy, student, name):
    batch, loss = anchors(policy, name), RETENTION_LOSSES[name].loss
    expected = loss(student, {key: value[1:] for key, value in batch.items()}).total
    batch[ACTION_TOKEN_MASK] = batch[ACTION_TOKEN_MASK].clone()
    batch[ACTION_TOKEN_MASK][0] = False
    batch |= to_policy_batch(RETENTION_LOSSES[name].targets(policy, batch), "cpu")
    if name == "teacher_tokens":  # decoded, whatever was recorded
        batch["teacher.token_mask"][0] = False
    assert loss(student, batch).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_tokens_have_the_form_of_recorded_ones(policy, student, monkeypatch):
    tokenizer = policy._paligemma_tokenizer
    end, *rest = tokenizer.encode("|")
    batch = random_batch(policy.config, 3, seed=0)
    length = batch[ACTION_TOKENS].shape[1]
    decoded = torch.full((3, length + 5), 9)
    decoded[0, 2] = end
    decoded[0, 3:] = 0
    decoded[1, length - 2] = end
    monkeypatch.setattr(retention, "greedy_action_tokens", lambda policy, batch: decoded)
    targets = RETENTION_LOSSES["teacher_tokens"].targets(policy, batch)
    tokens, mask = targets["teacher.tokens"], targets["teacher.token_mask"]
    first = [tokenizer.bos_token_id, 9, 9, end, *rest]
    assert tokens[0].tolist() == first + [0] * (length - len(first))
    assert mask[0].tolist() == [True] * len(first) + [False] * (length - len(first))
    assert tokens[1, -1] == end  # cut like a recorded action that is too long
    assert mask[1:].all()
    assert tokens[2].tolist() == [tokenizer.bos_token_id, *[9] * (length - 1)]
    found = RETENTION_LOSSES["teacher_tokens"].loss(student, batch | to_policy_batch(targets, "cpu"))
    expected = token_loss(student, batch | {ACTION_TOKENS: tokens.long(), ACTION_TOKEN_MASK: mask})
    assert (found.total, found.count) == (expected.total, expected.count)


def test_teacher_tokens_are_the_decoded_ones(policy):
    batch = random_batch(policy.config, 3, seed=0)
    targets = RETENTION_LOSSES["teacher_tokens"].targets(policy, batch)
    decoded = greedy_action_tokens(policy, batch)
    length = targets["teacher.tokens"].shape[1] - 1
    found, mask = targets["teacher.tokens"][:, 1:], targets["teacher.token_mask"][:, 1:]
    shared = mask & (decoded[:, :length] != 0)
    assert shared.sum() > 3
    assert torch.equal(found[shared], decoded[:, :length][shared].int())


def test_token_ce_needs_no_targets(student):
    batch = random_batch(student.config, 4, seed=3)
    found = RETENTION_LOSSES["token_ce"].loss(student, batch)
    logits, tokens = supervised_logits(student, batch)
    assert found.total.item() == pytest.approx(F.cross_entropy(logits, tokens, reduction="sum").item())
    assert RETENTION_LOSSES["token_ce"].targets is None


@pytest.mark.parametrize("name", RETENTION_LOSSES)
def test_sums_by_task_are_those_of_each_tasks_samples(policy, student, name):
    batch = random_batch(policy.config, 5, seed=0) if name == "token_ce" else anchors(policy, name)
    tasks = torch.tensor([2, 0, 2, 2, 0])
    found = by_task(name, 4)(student, batch | {TASK_INDEX: tasks})
    assert found.total.shape == found.count.shape == (4,)
    for task in range(4):
        mine = tasks == task
        if not mine.any():
            assert (found.total[task].item(), found.count[task].item()) == (0.0, 0.0)
            continue
        expected = RETENTION_LOSSES[name].loss(student, {key: value[mine] for key, value in batch.items()})
        assert found.count[task].item() == expected.count.item()
        assert found.total[task].item() == pytest.approx(expected.total.item(), rel=1e-5)
    found.total[0].backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients)
