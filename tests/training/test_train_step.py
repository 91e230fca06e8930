"""The two kinds of step on one process, by hand."""

import math

import pytest
import torch
from torch import nn

from craft_ds.algorithm.multiplier import DualState
from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.single import SingleEngine
from craft_ds.policies.pi0_fast.retention import LossTerms
from craft_ds.policies.token_loss import PolicyWithLoss, TokenLoss, token_loss
from craft_ds.testing.policies import read_from
from craft_ds.training.penalty import diagonal_fisher
from craft_ds.training.train_step import retention_step, task_step

START = (1.0, 2.0)
LR = 0.1


class LinearPolicy(nn.Module):
    """Loss of a token with slope c is c·w: its gradient is c, whatever w is."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START))


@token_loss.register
def _(policy: LinearPolicy, batch) -> TokenLoss:
    slopes = batch["slopes"]
    return TokenLoss((slopes @ policy.w).sum(), torch.tensor(float(len(slopes))))


def tokens(*slopes):
    return {"slopes": torch.tensor(slopes).reshape(-1, 2)}


class TwoLayers(nn.Module):
    """As `LinearPolicy`, with a number of its parameter in each of two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Module()
        self.first.w = nn.Parameter(torch.tensor(START[:1]))
        self.second = nn.Module()
        self.second.w = nn.Parameter(torch.tensor(START[1:]))

    @property
    def w(self):
        return torch.cat([self.first.w, self.second.w])


token_loss.register(TwoLayers)(token_loss.dispatch(LinearPolicy))


def by_two_tasks(policy, batch):
    """Every token is a sample; its task is given."""
    slopes = batch["slopes"]
    return LossTerms(slopes @ policy.w, torch.arange(len(slopes))).sum_by(batch["task_index"], 2)


def engine(optimizer=torch.optim.SGD, policy=None):
    policy = policy or LinearPolicy()
    return SingleEngine(
        PolicyWithLoss(policy),
        read_from(policy),
        lambda: optimizer(policy.parameters(), lr=LR),
        torch.device("cpu"),
    )


def weights(engine):
    return engine.module.policy.w.tolist()


def craft(**fields):
    return CraftConfig(enabled=True, **fields)


def moved(g_0, g_1):
    return pytest.approx([START[0] - LR * g_0, START[1] - LR * g_1], rel=1e-6)


def test_a_task_step_follows_the_mean_over_tokens():
    """Two micro-batches of one and three tokens: slopes (4, 0) once and (0, 8) three times."""
    one = engine()
    result = task_step(one, [tokens((4.0, 0.0)), tokens(*[(0.0, 8.0)] * 3)], max_norm=0.0)
    assert result.loss == pytest.approx((4 * 1 + 3 * 8 * 2) / 4)
    assert result.grad_norm == pytest.approx(math.hypot(1.0, 6.0))
    assert result.applied
    assert weights(one) == moved(1.0, 6.0)


@pytest.mark.parametrize(("max_norm", "factor"), [(2.5, 0.5), (5.1, 1.0), (0.0, 1.0), (-1.0, 1.0)])
def test_a_task_step_clips(max_norm, factor):
    one = engine()
    result = task_step(one, [tokens((3.0, 4.0))], max_norm)
    assert result.grad_norm == pytest.approx(5.0)  # before clipping
    assert weights(one) == moved(3.0 * factor, 4.0 * factor)


@pytest.mark.parametrize(
    ("mode", "merged"),
    [("weighted", (1.0 + 3.0 * 2.0, 1.0)), ("equal", (1.5, 0.5)), ("task_priority", (3.0, 1.0))],
)
def test_a_retention_step_without_conflict(mode, merged):
    """g_t = (1, 1), g_r = (2, 0), λ = 3."""
    one = engine()
    result = seen = retention_step(
        one,
        task=[tokens((1.0, 1.0))],
        anchors=[tokens((2.0, 0.0))],
        constraint=None,
        multiplier=3.0,
        craft=craft(projection_mode=mode),
        max_norm=0.0,
    )
    assert seen.triple == pytest.approx((2.0, 2.0, 4.0))
    assert not seen.merged.conflict
    assert seen.merged.cosine == pytest.approx(math.sqrt(0.5))
    assert (result.loss, seen.retention_loss) == pytest.approx((3.0, 2.0))
    assert result.grad_norm == pytest.approx(math.hypot(*merged))
    assert weights(one) == moved(*merged)


@pytest.mark.parametrize(
    ("changes", "merged", "removed"),
    [
        ({"projection_mode": "weighted"}, (6.0, 1.0), 0.5),
        ({"projection_mode": "equal"}, (1.0, 0.5), 0.5),
        ({"projection_mode": "task_priority"}, (2.0, 1.0), 0.5),
        # tr = -2, tt = 2, rr = 4; the retention gradient loses its part along g_t too: (1, 1) is left.
        ({"merging": "pcgrad"}, (3.0, 4.0), 0.5),
        ({"merging": "upgrad"}, (1.5, 2.0), 0.5),
        ({"merging": "agem"}, (0.0, 1.0), 0.5),
        ({"merging": "mgda"}, (0.2, 0.6), 0.0),  # w = (4 + 2) / (2 + 4 + 4) = 0.6
    ],
)
def test_a_retention_step_with_conflict(changes, merged, removed):
    """g_t = (-1, 1) loses its part along g_r = (2, 0): (0, 1) is left."""
    one = engine()
    seen = retention_step(
        one,
        task=[tokens((-1.0, 1.0))],
        anchors=[tokens((2.0, 0.0))],
        constraint=None,
        multiplier=3.0,
        craft=craft(**changes),
        max_norm=0.0,
    )
    assert seen.merged.conflict
    assert seen.merged.removed == pytest.approx(removed)
    assert seen.grad_norm == pytest.approx(math.hypot(*merged))
    assert seen.multiplier == 3.0
    assert weights(one) == moved(*merged)


def test_a_retention_step_clips_the_merged_gradient():
    one = engine()
    result = retention_step(
        one,
        task=[tokens((3.0, 0.0))],
        anchors=[tokens((0.0, 4.0))],
        constraint=None,
        multiplier=1.0,
        craft=craft(),
        max_norm=1.0,
    )
    assert result.grad_norm == pytest.approx(5.0)
    assert weights(one) == moved(0.6, 0.8)


def test_each_pass_is_a_mean_over_its_own_tokens():
    """Four task tokens in one micro-batch, anchors of one and two tokens in two."""
    one = engine()
    seen = retention_step(
        one,
        task=[tokens(*[(1.0, 0.0)] * 4)],
        anchors=[tokens((0.0, 3.0)), tokens((0.0, 3.0), (0.0, 0.0))],
        constraint=None,
        multiplier=1.0,
        craft=craft(),
        max_norm=0.0,
    )
    assert seen.triple == pytest.approx((1.0, 0.0, 4.0))
    assert weights(one) == moved(1.0, 2.0)


def test_the_constraint_is_measured_on_its_own_anchors():
    one = engine()
    seen = retention_step(
        one,
        task=[tokens((1.0, 0.0))],
        anchors=[tokens((0.0, 1.0))],
        constraint=[tokens((5.0, 0.0)), tokens((0.0, 1.0), (0.0, 1.0))],
        multiplier=1.0,
        craft=craft(),
        max_norm=0.0,
    )
    assert seen.retention_loss == pytest.approx((5.0 + 2.0 + 2.0) / 3)
    assert weights(one) == moved(1.0, 1.0)


def assert_nothing_happened(one, applied):
    assert not applied
    assert weights(one) == list(START)
    assert not one.optimizer.state
    # And nothing is left over for the next step.
    assert task_step(one, [tokens((1.0, 0.0))], 0.0).grad_norm == 1.0
    assert weights(one)[1] == START[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_task_step_that_is_not_finite_changes_nothing(bad):
    one = engine(torch.optim.Adam)
    assert_nothing_happened(one, task_step(one, [tokens((1.0, 1.0)), tokens((1.0, bad))], 1.0).applied)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["task", "anchors", "constraint"])
def test_a_retention_step_that_is_not_finite_changes_nothing(bad, where):
    one = engine(torch.optim.Adam)
    batches = {name: [tokens((1.0, 1.0))] for name in ("task", "anchors", "constraint")}
    batches[where] = [tokens((1.0, bad))]
    result = retention_step(one, **batches, multiplier=1.0, craft=craft(), max_norm=1.0)
    assert_nothing_happened(one, result.applied)


def test_no_supervised_token_anywhere_is_a_step_of_length_zero():
    one = engine()
    result = task_step(one, [tokens()], 1.0)
    assert (result.loss, result.grad_norm, result.applied) == (0.0, 0.0, True)
    result = retention_step(
        one,
        task=[tokens()],
        anchors=[tokens()],
        constraint=[tokens()],
        multiplier=1.0,
        craft=craft(),
        max_norm=1.0,
    )
    assert (result.loss, result.grad_norm, result.applied) == (0.0, 0.0, True)
    assert result.retention_loss is None  # nothing was measured
    assert result.merged.cosine == 0.0
    assert weights(one) == list(START)


def test_anchors_without_tokens_leave_the_task_gradient():
    one = engine()
    seen = retention_step(
        one,
        task=[tokens((1.0, 1.0))],
        anchors=[tokens()],
        constraint=None,
        multiplier=3.0,
        craft=craft(),
        max_norm=0.0,
    )
    assert not seen.merged.conflict
    assert weights(one) == moved(1.0, 1.0)


def test_lambda_zero_and_no_conflict_is_a_task_step():
    one, other = engine(torch.optim.Adam), engine(torch.optim.Adam)
    for _ in range(3):
        task_step(one, [tokens((1.0, 2.0))], 0.5)
        retention_step(
            other,
            task=[tokens((1.0, 2.0))],
            anchors=[tokens((1.0, 0.0))],
            constraint=None,
            multiplier=0.0,
            craft=craft(),
            max_norm=0.5,
        )
    assert weights(one) == pytest.approx(weights(other), rel=1e-6)


def test_the_dynamic_barrier_reads_the_step_itself():
    """φ = 2·(L_ret − ε) = 2·(2 − 0.5) = 3, λ = (3 + 2) / 4; the merged gradient's product with g_r is φ."""
    one, config = engine(), craft(multiplier="dynamic_barrier", barrier_beta=2.0, use_grad_projection=False)
    seen = retention_step(
        one,
        task=[tokens((-1.0, 1.0))],
        anchors=[tokens((2.0, 0.0))],
        constraint=None,
        multiplier=DualState(config).in_step(epsilon=0.5),
        craft=config,
        max_norm=0.0,
    )
    assert seen.multiplier == pytest.approx(1.25)
    assert weights(one) == moved(1.5, 1.0)


def test_surgery_by_layer_projects_a_layer_alone():
    """g_t = (2, -1), g_r = (1, 3): the gradients agree in the first layer and conflict in the second."""
    one = engine(policy=TwoLayers())
    seen = retention_step(
        one,
        task=[tokens((2.0, -1.0))],
        anchors=[tokens((1.0, 3.0))],
        constraint=None,
        multiplier=0.5,
        craft=craft(surgery_scope="layer"),
        max_norm=0.0,
    )
    assert seen.triple == pytest.approx((5.0, -1.0, 10.0))
    assert (seen.merged.conflict, seen.merged.conflict_share) == (True, 0.5)  # cos = -0.14
    assert seen.merged.removed == pytest.approx(1.0 / 5.0)
    assert seen.grad_norm == pytest.approx(math.hypot(2.5, 1.5))
    assert weights(one) == moved(2.5, 1.5)


def test_the_layers_are_clipped_together():
    one = engine(policy=TwoLayers())
    retention_step(
        one,
        task=[tokens((2.0, -1.0))],
        anchors=[tokens((1.0, 3.0))],
        constraint=None,
        multiplier=0.5,
        craft=craft(surgery_scope="layer"),
        max_norm=1.0,
    )
    assert weights(one) == moved(2.5 / math.hypot(2.5, 1.5), 1.5 / math.hypot(2.5, 1.5))


def test_each_tasks_loss_has_its_own_weight():
    """Three tokens of task 0 with slope (0, 1), one of task 1 with (4, 0): g_r = (4·2, 3·0.5) / 4."""
    one = engine()
    anchors = {
        **tokens((0.0, 1.0), (4.0, 0.0), (0.0, 1.0), (0.0, 1.0)),
        "task_index": torch.tensor([0, 1, 0, 0]),
    }
    constraint = {**tokens((1.0, 0.0), (3.0, 0.0)), "task_index": torch.tensor([0, 0])}
    seen = retention_step(
        one,
        task=[tokens((1.0, 0.0))],
        anchors=[anchors],
        constraint=[constraint],
        multiplier=(0.5, 2.0),
        craft=craft(),
        max_norm=0.0,
        anchor_loss=by_two_tasks,
    )
    assert weights(one) == moved(1.0 + 2.0, 1.5 / 4)
    assert seen.triple == pytest.approx((1.0, 2.0, 4.0 + 0.375**2))
    assert seen.task_losses[0] == seen.retention_loss == pytest.approx(2.0)
    assert math.isnan(seen.task_losses[1])
    assert (seen.multiplier, seen.task_multipliers) == (1.25, (0.5, 2.0))

    other = retention_step(  # measured on the anchors of the gradient, without their weights
        engine(),
        task=[tokens((1.0, 0.0))],
        anchors=[anchors],
        constraint=None,
        multiplier=(0.5, 2.0),
        craft=craft(),
        max_norm=0.0,
        anchor_loss=by_two_tasks,
    )
    assert other.task_losses == pytest.approx((2.0, 4.0))
    assert other.retention_loss == pytest.approx((3 * 2.0 + 4.0) / 4)


def test_equal_lambdas_are_one_lambda():
    anchors = {**tokens((0.0, 1.0), (-4.0, 1.0)), "task_index": torch.tensor([0, 1])}
    found = []
    for multiplier, loss in ((0.7, token_loss), ((0.7, 0.7), by_two_tasks)):
        one = engine()
        retention_step(
            one,
            task=[tokens((1.0, -0.5))],
            anchors=[anchors],
            constraint=None,
            multiplier=multiplier,
            craft=craft(),
            max_norm=1.0,
            anchor_loss=loss,
        )
        found.append(weights(one))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_scale_is_applied_after_the_clip_factor():
    """‖g_t + g_r‖ = 5: the step is (3 + 0, 0 + 3·4) / 5, longer than 1."""
    one = engine()
    seen = retention_step(
        one,
        task=[tokens((3.0, 0.0))],
        anchors=[tokens((0.0, 4.0))],
        constraint=None,
        multiplier=1.0,
        craft=craft(),
        max_norm=1.0,
        retention_scale=3.0,
    )
    assert seen.grad_norm == pytest.approx(5.0)
    assert seen.merged.retention_weight == 3.0
    assert weights(one) == moved(0.6, 2.4)


def penalty(weight=2.0, fisher=None):
    """P = weight·F·(w − (0, 1)) at w = (1, 2): (weight, weight) with F = 1."""
    return QuadraticPenalty(weight, [torch.tensor([0.0, 1.0])], fisher and [torch.tensor(fisher)])


@pytest.mark.parametrize(
    ("fisher", "p", "loss"), [(None, (2.0, 2.0), 2.0), ((0.5, 3.0), (1.0, 6.0), 3.5)], ids=["l2", "ewc"]
)
@pytest.mark.parametrize("max_norm", [0.0, 2.5])
def test_a_penalty_is_added_to_the_mean_task_gradient(fisher, p, loss, max_norm):
    """g_t = (1, 6) is a mean over four tokens; the penalty is not divided by their number."""
    one = engine()
    batches = [tokens((4.0, 0.0)), tokens(*[(0.0, 8.0)] * 3)]
    result = task_step(one, batches, max_norm, penalty=penalty(fisher=fisher))
    norm = math.hypot(1.0 + p[0], 6.0 + p[1])
    assert result.penalty_loss == pytest.approx(loss)
    assert result.loss == pytest.approx((4 * 1 + 3 * 8 * 2) / 4)  # without the penalty
    assert result.grad_norm == pytest.approx(norm)
    factor = max_norm / norm if max_norm else 1.0
    assert weights(one) == moved(factor * (1.0 + p[0]), factor * (6.0 + p[1]))


@pytest.mark.parametrize("mode", ["weighted", "equal"])
def test_surgery_sees_the_penalty_as_part_of_the_task_gradient(mode):
    """g_t = (-4, 1) + p = (-2, 3) loses its part along g_r = (2, 0), which is also a mean over two tokens."""
    one = engine()
    seen = retention_step(
        one,
        task=[tokens(*[(-4.0, 1.0)] * 3)],
        anchors=[tokens((4.0, 0.0), (0.0, 0.0))],
        constraint=None,
        multiplier=3.0,
        craft=craft(projection_mode=mode),
        max_norm=0.0,
        penalty=penalty(),
    )
    assert seen.triple == pytest.approx((13.0, -4.0, 4.0))
    assert seen.merged.conflict
    assert seen.penalty_loss == pytest.approx(2.0)
    merged = (6.0, 3.0) if mode == "weighted" else (1.0, 1.5)
    assert seen.grad_norm == pytest.approx(math.hypot(*merged))
    assert weights(one) == moved(*merged)


def test_a_penalty_that_is_not_finite_skips_the_step():
    one = engine(torch.optim.Adam)
    result = task_step(one, [tokens((1.0, 1.0))], 1.0, penalty=penalty(fisher=(math.inf, 1.0)))
    assert_nothing_happened(one, result.applied)


def test_fisher_information_is_the_mean_square_of_the_gradients_of_single_samples():
    """The gradients of the two samples, summed over their tokens, are (3, 2) and (0, -4)."""
    one = engine()
    [fisher] = diagonal_fisher(one, [tokens((1.0, 2.0), (2.0, 0.0)), tokens((0.0, -4.0))])
    assert fisher.tolist() == [4.5, 10.0]
    assert weights(one) == list(START)
    assert not any(shard.any() for shard in one.gradient())
