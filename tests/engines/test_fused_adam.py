"""The fused Adam gives the numbers of the others, and other optimizers are left alone."""

import pytest
import torch

from craft_ds.engines.fused_adam import fuse_

KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.8, 0.95)),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:1], "lr": 1e-3}, {"params": parameters[1:], "weight_decay": 0.0}], lr=1e-2
    ),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (1, 2, 2), (0, 4)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer, found, count=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in found:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_same(kind):
    plain, fused = parameters(), parameters()
    optimizer = fuse_(KINDS[kind](fused))
    assert all(group["fused"] for group in optimizer.param_groups)
    steps(KINDS[kind](plain), plain)
    steps(optimizer, fused)
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_groups_that_are_added_later_are_fused_too():
    optimizer = fuse_(torch.optim.AdamW(parameters()[:1]))
    optimizer.add_param_group({"params": parameters()[1:]})
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_other_optimizers_are_left_alone():
    class Own(torch.optim.AdamW):
        pass

    for optimizer in (torch.optim.SGD(parameters(), lr=0.1), Own(parameters())):
        groups = [dict(group) for group in optimizer.param_groups]
        assert fuse_(optimizer) is optimizer
        assert [dict(group) for group in optimizer.param_groups] == groups
