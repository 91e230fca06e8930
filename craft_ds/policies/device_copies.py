"""Copies to the device that the host does not wait for, and masks that it does not read back from there.

Masks decide shapes: how much padding is cut, and where a token is supervised. Reading one from an accelerator
waits for all work in its queue, so the copy of a mask keeps the mask that it was made from.
"""

import torch
from torch import Tensor


def copy_to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; to an accelerator by pinned memory, without waiting.

    Args:
        value: Any tensor. `on_host` returns a mask (bool) for its copy until one of them is changed in place.
        device: The device.
    """
    device, from_host = torch.device(device), value.device.type == "cpu"
    if from_host and device.type == "cuda" and not value.is_pinned():
        value = value.pin_memory()
    copy = value.to(device, non_blocking=from_host)
    if from_host and copy is not value and value.dtype == torch.bool:
        copy.craft_ds_on_host = value, _changes(value, copy)  # type: ignore[attr-defined]
    return copy


def on_host(mask: Tensor) -> Tensor:
    """Return a mask on the CPU; waits for the device only if `copy_to_device` has not copied it there."""
    found: tuple[Tensor, list[int]] | None = getattr(mask, "craft_ds_on_host", None)
    if found is not None and found[1] == _changes(found[0], mask):
        return found[0]
    return mask.cpu()


def _changes(*masks: Tensor) -> list[int]:
    """Return how often each has been changed in place; torch does not count it in inference mode."""
    return [0 if mask.is_inference() else mask._version for mask in masks]
