"""Moments in bf16 and 8 bits: bounds of the error, no bias, and an exact way back from fp32."""

import pytest
import torch

from craft_ds.engines.moment_formats import BLOCK, FORMATS, dynamic_map, moment_bytes

ALL = [(state, moment) for state in FORMATS for moment in FORMATS[state]]
every_format = pytest.mark.parametrize(("state", "moment"), ALL)


def values(moment, rows=64, spread=3.0):
    """Return rows of a moment that span many magnitudes, within blocks and between them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    found = normal(rows, BLOCK) * torch.exp(spread * normal(rows, BLOCK))
    found *= torch.logspace(-13, 7, rows)[:, None]
    found[0] = 0
    found[1] = -found[1].abs()
    return found.square() if moment == "exp_avg_sq" else found


def uniform(like, seed=0):
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))


@every_format
@pytest.mark.parametrize("threshold", ["nearest", "stochastic"])
def test_packing_again_gives_the_same_bits(state, moment, threshold):
    form, found = FORMATS[state][moment], values(moment)
    tiny = found[2:22] / found[2:22].abs().amax(1, keepdim=True) * torch.logspace(-44, -25, 20)[:, None]
    found = torch.cat([found, tiny])
    packed = form.pack(found, 0.5 if threshold == "nearest" else uniform(found))
    again = form.pack(form.unpack(packed), 0.5)
    for one, other in zip(packed, again, strict=True):
        assert torch.equal(one, other)


@every_format
def test_zeros_are_zeros(state, moment):
    form = FORMATS[state][moment]
    stored = form.zeros(3, torch.device("cpu"))
    assert not form.unpack(stored).any()
    packed = form.pack(torch.zeros(3, BLOCK), 0.5)
    assert [(part.dtype, part.shape) for part in packed] == [(part.dtype, part.shape) for part in stored]
    assert form.unpack(packed).abs().max() < 1e-30


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_error_of_bf16(moment):
    form, found = FORMATS["bf16"][moment], values(moment)
    error = (form.unpack(form.pack(found, 0.5)) - found).abs()
    assert (error <= 2**-8 * found.abs() + 1e-38).all()
    assert (error > 2**-10 * found.abs()).any()


def test_error_of_8_bits():
    """Half the distance of two levels: at the edges of decades 0.0070 of the value's decade."""
    form, found = FORMATS["int8"]["exp_avg"], values("exp_avg")[2:]
    unit = found / found.abs().amax(1, keepdim=True)
    error = (form.unpack(form.pack(found, 0.5)) - found).abs() / found.abs().amax(1, keepdim=True)
    assert (error[unit.abs() < 0.9] <= 0.00704).all()
    assert (error <= 0.0106).all()  # between −0.979 and −1
    assert (error[unit.abs() < 0.1] <= 0.0049).all()
    assert (error[unit.abs() < 0.001] <= 0.00011).all()
    assert (error[unit.abs() > 0.5] > 0.003).any()


def test_error_of_the_root_in_8_bits():
    form, found = FORMATS["int8"]["exp_avg_sq"], values("exp_avg_sq")[2:]
    unit = (found / found.amax(1, keepdim=True)).sqrt()
    seen = (form.unpack(form.pack(found, 0.5)) / found.amax(1, keepdim=True)).sqrt()
    error = (seen - unit).abs()
    assert (error <= 0.0037).all()
    assert (error[unit < 0.1] <= 0.00075).all()
    assert (error[unit < 0.001] <= 0.000032).all()
    # A divisor is never much too small, and never 0.
    assert (seen >= unit / 2.4).all()
    assert (seen[unit < 1e-7] > 3e-7).all()
    assert (unit < 1e-7).any()


@every_format
def test_stochastic_rounding_has_no_bias(state, moment):
    form, found = FORMATS[state][moment], values(moment, rows=8, spread=1.0)[2:]
    found = found.clamp(min=1e-6 * found.amax(1, keepdim=True)) if moment == "exp_avg_sq" else found
    scale = found.abs().amax(1, keepdim=True)
    draws, error = 4000, torch.zeros(found.shape, dtype=torch.float64)
    for seed in range(draws):
        error += (form.unpack(form.pack(found, uniform(found, seed))) - found).double()
    gap = torch.maximum(
        (form.unpack(form.pack(found, 0.0)) - found).abs(), (form.unpack(form.pack(found, 1.0)) - found).abs()
    )
    assert ((error / draws).abs() <= 5 * gap / draws**0.5 + 1e-6 * scale).all()
    nearest = form.unpack(form.pack(found, 0.5)) - found
    assert (nearest.abs() > 5 * gap / draws**0.5 + 1e-6 * scale).any()


@pytest.mark.parametrize("state", FORMATS)
def test_a_second_moment_falls_by_a_thousandth_per_step(state):
    """It falls beside one that does not, which keeps the scale of the block."""
    form = FORMATS[state]["exp_avg_sq"]

    def after(threshold):
        now = torch.full((64, BLOCK), 0.3)
        for step in range(700):
            now *= 0.999
            now[:, 0] = 1.0
            now = form.unpack(form.pack(now, threshold(now, step)))
        return now[:, 1:].mean().item()

    assert after(uniform) == pytest.approx(0.3 * 0.999**700, rel=0.01)
    assert after(lambda now, step: 0.5) > 0.25  # to the nearest it stays where it is


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_the_table_finds_the_level_below(moment):
    levels = dynamic_map(signed=moment == "exp_avg")
    levels = (levels if moment == "exp_avg" else levels.square()).float()
    found = values(moment, rows=500, spread=4.0)
    codes, scale = FORMATS["int8"][moment].pack(found, 1.0)
    below = torch.bucketize(found / scale[:, None], levels, right=True) - 1
    assert torch.equal(codes.long(), below.clamp(min=0))


def test_the_map_is_that_of_bitsandbytes():
    """As its functional.create_dynamic_map: seven decades, each with twice as many levels as the last."""
    unsigned, signed = dynamic_map(signed=False), dynamic_map(signed=True)
    assert (len(unsigned), len(signed)) == (255, 256)
    assert unsigned[:3].tolist() == pytest.approx([3.25e-7, 7.75e-7, 2.125e-6])
    assert unsigned[-2:].tolist() == pytest.approx([0.99648, 1.0], rel=1e-5)
    assert signed[[0, 1, 127, -2, -1]].tolist() == pytest.approx([-1, -0.97891, 0, 0.99297, 1], rel=1e-5)
    assert (signed.diff() > 0).all()


@pytest.mark.parametrize(("state", "each"), [("fp32", 8), ("bf16", 4), ("int8", 2 + 8 / 256)])
def test_bytes(state, each):
    assert moment_bytes(state, 4096) == 4096 * each
    assert moment_bytes(state, 4097) == (4097 * 8 if state == "fp32" else (4096 + 256) * each)
    if state != "fp32":
        stored = [part for form in FORMATS[state].values() for part in form.zeros(17, torch.device("cpu"))]
        assert sum(part.nbytes for part in stored) == moment_bytes(state, 4097)
