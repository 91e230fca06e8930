"""Adam with small moments: near torch's, exact when resumed, and safe where gradients vanish."""

import pytest
import torch

from craft_ds.engines import compact_adam
from craft_ds.engines.compact_adam import CompactAdam, compact
from craft_ds.engines.optimizer_state import Part, load_moments, read_moments
from craft_ds.errors import UserError

SHAPES = [(96, 128), (300, 7), (5,), (1,), (0, 3), (1024,)]
KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:2], "lr": 1e-4}, {"params": parameters[2:], "weight_decay": 0.0}], lr=1e-3
    ),
}
# Twice what was measured: 0.005 and 0.025, of a path of 100 steps.
BOUNDS = {"bf16": 0.01, "int8": 0.05}
states = pytest.mark.parametrize("state", BOUNDS)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer, found, count, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in found:
            size = torch.exp(torch.linspace(-6, 0, parameter.numel())).view(parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = size * (noise + parameter.detach().sign())
        optimizer.step()


def moved(found, start):
    return torch.cat([(one - other).detach().flatten() for one, other in zip(found, start, strict=True)])


@states
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1 << 14, 3])
def test_near_torch(monkeypatch, kind, state, rows):
    monkeypatch.setattr(compact_adam, "ROWS_AT_ONCE", rows)
    exact, found = parameters(), parameters()
    optimizer = compact(KINDS[kind](found), state)
    assert isinstance(optimizer, CompactAdam)
    steps(KINDS[kind](exact), exact, 100)
    steps(optimizer, found, 100)
    expected = moved(exact, parameters())
    error = (moved(found, parameters()) - expected).norm() / expected.norm()
    assert 1e-5 < error < BOUNDS[state]


@states
def test_parameters_without_a_gradient_stay(state):
    found = parameters()
    optimizer = compact(KINDS["adamw"](found), state)
    found[0].grad = torch.ones_like(found[0])
    optimizer.step()
    assert not torch.equal(found[0], parameters()[0])
    assert torch.equal(found[1], parameters()[1])
    assert list(optimizer.state) == [found[0]]


@states
def test_parameters_of_different_steps(state):
    """Their bias corrections differ, so that they are not updated together."""
    found = parameters()
    optimizer = compact(KINDS["adamw"](found), state)
    steps(optimizer, found[:1], 20)
    one, other = compact(KINDS["adamw"](found[1:2]), state), compact(KINDS["adamw"](found[:2]), state)
    other.state = optimizer.state
    before = found[1].detach().clone()
    found[0].grad, found[1].grad = torch.zeros_like(found[0]), torch.ones_like(found[1])
    other.step()
    together = found[1].detach().clone()
    found[1].data.copy_(before)
    one.step()
    torch.testing.assert_close(together, found[1].detach())


@states
def test_the_same_steps_after_a_round_trip_in_fp32(state):
    found = parameters()
    optimizer = compact(KINDS["adamw"](found), state)
    steps(optimizer, found, 3)
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in found]
    resumed = compact(KINDS["adamw"](again), state)
    for number, (parameter, other) in enumerate(zip(found, again, strict=True)):
        moments = read_moments(optimizer, parameter)

        def read(name, start, stop, moments=moments):
            return moments[name.split(".")[1]][start:stop]

        if not parameter.numel():
            continue
        parts = [Part(f"p{number}", 0, 0, parameter.numel())]
        load_moments(resumed, other, parts, read, list(moments), 3)
    steps(optimizer, found, 3, first=3)
    steps(resumed, again, 3, first=3)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)
        for moment, values in read_moments(optimizer, one).items():
            assert torch.equal(values, read_moments(resumed, other)[moment])


@states
def test_a_range_of_moments(state):
    found = parameters()
    optimizer = compact(KINDS["adamw"](found), state)
    assert dict(read_moments(optimizer, found[1])) == {}
    steps(optimizer, found, 2)
    complete = read_moments(optimizer, found[1])
    assert {values.shape for values in complete.values()} == {(2100,)}
    for start, numel in ((0, 1), (250, 20), (256, 256), (2000, 100)):
        part = read_moments(optimizer, found[1], start, numel)
        for moment, values in part.items():
            assert torch.equal(values, complete[moment][start : start + numel])


def test_other_moments_are_refused():
    found = parameters()[:1]
    optimizer = compact(KINDS["adamw"](found), "int8")
    assert isinstance(optimizer, CompactAdam)
    with pytest.raises(ValueError, match="it holds momentum_buffer, not exp_avg, exp_avg_sq"):
        optimizer.set_moments(found[0], ["momentum_buffer"], lambda _: found[0].detach().view(-1), 1)


@states
def test_a_moment_is_packed_before_the_next_one_is_read(state):
    """Both in fp32 at once may not fit where the checkpoint was written."""
    [parameter] = found = [torch.nn.Parameter(torch.zeros(600))]
    optimizer, packed = compact(KINDS["adamw"](found), state), []

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        packed.append((name, "exp_avg" in optimizer.state[parameter]))
        return torch.zeros(stop - start)

    load_moments(optimizer, parameter, [Part("p", 0, 0, 600)], read, ["exp_avg", "exp_avg_sq"], 1)
    assert packed == [("p.exp_avg", False), ("p.exp_avg_sq", True)]


@states
def test_small_gradients_beside_large_ones(state):
    """A divisor rounded to 0 would throw a weight far away as soon as its gradient is 0."""
    found = [torch.nn.Parameter(torch.zeros(256))]
    optimizer = compact(torch.optim.AdamW(found, lr=1e-3, weight_decay=0.0), state)
    size = torch.logspace(-9, 2, 256)
    for step in range(40):
        found[0].grad = size * (torch.rand(256, generator=torch.Generator().manual_seed(step)) + 0.5)
        found[0].grad *= step < 20
        optimizer.step()
    assert found[0].abs().max() < 0.1  # torch's own: 0.029
    assert (found[0][150:].abs() > 0.005).all()


@states
def test_second_moments_fall_as_in_torch(state):
    """A step moves them by a thousandth, less than what one rounding moves them."""
    exact, found = [torch.nn.Parameter(torch.zeros(8, 256))], [torch.nn.Parameter(torch.zeros(8, 256))]
    optimizers = KINDS["adamw"](exact), compact(KINDS["adamw"](found), state)
    for step in range(500):
        gradient = torch.full((8, 256), 1.0 if step < 20 else 0.01)
        gradient[:, 0] = 3.0  # keeps the scale of its block
        for parameter, optimizer in zip((exact[0], found[0]), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    expected = optimizers[0].state[exact[0]]["exp_avg_sq"][:, 1:].mean()
    assert expected < 0.7 * 0.02
    values = read_moments(optimizers[1], found[0])["exp_avg_sq"].view(8, 256)[:, 1:].mean()
    assert values.item() == pytest.approx(expected.item(), rel=0.02)


def test_fp32_is_torchs_own():
    optimizer = KINDS["adamw"](parameters())
    assert compact(optimizer, "fp32") is optimizer


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD(parameters(), lr=0.1),
        torch.optim.AdamW(parameters(), amsgrad=True),
        torch.optim.Adam(parameters(), maximize=True),
    ],
)
def test_other_optimizers_are_refused(optimizer):
    with pytest.raises(UserError, match=r"--engine\.optimizer_state=int8 is for Adam and AdamW") as error:
        compact(optimizer, "int8")
    assert "\n" not in str(error.value)
