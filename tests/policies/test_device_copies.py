"""Masks that were copied to the device stay known on the host; the counter of waits sees the others."""

import pytest
import torch

from craft_ds.policies.device_copies import copy_to_device, on_host
from craft_ds.testing.host_waits import HostWaits

MASK = torch.tensor([[True, True, False], [True, False, False]])
HERE = __name__.partition(".")[0]


def test_the_copy_of_a_mask_keeps_the_mask():
    copy = copy_to_device(MASK, "meta")
    assert copy.device.type == "meta"
    assert on_host(copy) is MASK


def test_a_tensor_on_the_device_is_not_copied():
    assert copy_to_device(MASK, "cpu") is MASK
    assert on_host(MASK) is MASK
    copy = copy_to_device(MASK, "meta")
    assert copy_to_device(copy, "meta") is copy


def test_another_mask_is_read_from_the_device():
    """A part of a mask, or what is computed from one, has other values than what was copied."""
    waits = HostWaits()
    copy = waits.copy_to_device(MASK, "cpu")
    with waits:
        assert on_host(copy) is MASK
    assert waits.take() == {}
    with waits:
        assert on_host(copy[:1]).sum().item() == 2
    assert waits.take() == {"craft_ds": 1}


@pytest.mark.parametrize("changed", ["mask", "copy"])
def test_a_mask_that_was_changed_is_read_from_the_device(changed):
    waits, mask = HostWaits(), MASK.clone()
    copy = waits.copy_to_device(mask, "cpu")
    {"mask": mask, "copy": copy}[changed].fill_(True)
    with waits:
        found = on_host(copy)
    assert waits.take() == {"craft_ds": 1}
    assert torch.equal(found, copy)


@torch.inference_mode()
def test_masks_of_inference_mode_are_kept_too():
    mask = MASK.clone()
    assert on_host(copy_to_device(mask, "meta")) is mask


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: 3 if x[0] > 0 else 4,
        lambda x: [0, 1, 2][x[0].long()],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.add(x, x, alpha=x[0]),
    ],
)
def test_the_counter_sees_a_wait(wait):
    x = torch.ones(2)
    with HostWaits() as waits:
        wait(x)
    assert sum(waits.take().values()) == 1


def test_the_counter_sees_waits_of_a_backward_pass():
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: gradient * gradient.sum().item())
    with HostWaits() as waits:
        y.sum().backward()
    assert waits.take() == {HERE: 1}


def test_values_of_the_host_are_no_wait():
    waits = HostWaits()
    copy = waits.copy_to_device(MASK, "cpu")
    with waits:
        host = on_host(copy)
        assert host.any(dim=0).nonzero().tolist() == [[0], [1]]
        assert (copy & copy).sum(dim=1).dtype == torch.int64
    assert waits.take() == {}


@pytest.mark.parametrize(
    "copy",
    [
        lambda mask: mask.to("cpu"),
        lambda mask: torch.zeros(2, 3).copy_(mask),
        lambda mask: mask.copy_(torch.zeros(2, 3)),
    ],
)
def test_a_copy_that_waits_for_the_device_is_seen(copy):
    waits, mask = HostWaits(), MASK.clone()
    waits.keep_on_host(mask)
    with waits:
        copy(mask)
    assert waits.take() == {HERE: 1}
