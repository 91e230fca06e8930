"""The way of samples to the policy's input: processors in the workers, images as bytes until the device."""

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.datasets.io_utils import hf_transform_to_torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from craft_ds.data.seeded import seeded
from craft_ds.errors import UserError, one_line
from craft_ds.policies.device_copies import copy_to_device


@dataclass(frozen=True)
class PolicyInput:
    """The policy's preprocessor, in two parts: one for data-loader workers, one for the training process.

    Attributes:
        preprocessor: The preprocessor, on the CPU.
        bytes_pass: It leaves images as they are, so that they can pass it as uint8.
    """

    preprocessor: PolicyProcessorPipeline
    bytes_pass: bool

    def process(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Turn collated samples into the policy's input, with uint8 images where `bytes_pass`."""
        return self.preprocessor(samples if self.bytes_pass else images_to_float(samples))

    def to_device(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Move what `process` returned to a device, with float images."""
        moved = to_device(batch, device)
        return images_to_float(moved) if self.bytes_pass else moved


def open_policy_input(preprocessor: PolicyProcessorPipeline, samples: dict[str, Any]) -> PolicyInput:
    """Try a preprocessor on collated samples.

    Images pass it as uint8 if that changes no value of the result, which is tried with noise for images.

    Args:
        preprocessor: On the CPU; what it raises is not caught.
        samples: Collated samples of the data set; not changed.
    """
    expects_floats, takes_bytes = (PolicyInput(preprocessor, bytes_pass) for bytes_pass in (False, True))
    expects_floats.process(samples)
    generator = torch.Generator().manual_seed(0)
    noise = {
        key: torch.randint(256, value.shape, dtype=torch.uint8, generator=generator)
        for key, value in samples.items()
        if _is_uint8(value)
    }
    try:
        with seeded("try images"):
            expected = expects_floats.process(samples | noise)
        with seeded("try images"):  # on a copy: what a step keeps of images must not be of bytes
            found = copy.deepcopy(preprocessor)(samples | noise)
    except Exception:  # of any step that expects float images
        return expects_floats
    return takes_bytes if _equal(images_to_float(found), expected) else expects_floats


def check_picklable(preprocessor: PolicyProcessorPipeline) -> None:
    """Check that a preprocessor can be sent to workers that are not forked.

    Raises:
        UserError: It cannot.
    """
    try:
        # Pickles as the workers' start does, but moves no tensor to shared memory.
        torch.save(preprocessor, io.BytesIO())
    except Exception as error:  # it raises many types
        raise UserError(
            f"the policy's processors cannot be sent to data-loader workers ({one_line(error)}): use "
            "--dataloader_multiprocessing_context=fork or --num_workers=0"
        ) from error


def images_to_float(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turn uint8 images into float32 in [0, 1], as LeRobot's training loop does before its processors.

    Written so that the values are the same on every device; compared on the CPU only.
    """
    return {key: _to_float(value) if _is_uint8(value) else value for key, value in batch.items()}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move the tensors of a batch to a device, as `copy_to_device` does."""
    return {
        key: copy_to_device(value, device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def keep_images_uint8(dataset: LeRobotDataset) -> None:
    """Make a data set return stored pictures as uint8, as it does with the frames of videos.

    LeRobot divides them by 255 in the worker, which passes on four times the bytes. With image transforms,
    which round otherwise on uint8, the data set is left as it is.
    """
    if dataset.image_transforms is None:
        dataset.hf_dataset.set_transform(_to_tensors)


def _to_tensors(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Convert rows as LeRobot does, but RGB pictures to uint8 (C, H, W)."""
    pictures = {
        key: [pil_to_tensor(image) for image in values]
        for key, values in rows.items()
        if all(isinstance(image, Image.Image) and image.mode == "RGB" for image in values)
    }
    others = {key: values for key, values in rows.items() if key not in pictures}
    return rows | hf_transform_to_torch(others) | pictures


def _is_uint8(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _to_float(image: Tensor) -> Tensor:
    # CUDA multiplies by 1/255 where the divisor is a number, which rounds otherwise than a division.
    return image.float().div_(torch.full((), 255.0, device=image.device))


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two batches have the same keys, and tensors of the same types and values."""
    return one.keys() == other.keys() and all(
        one[key].dtype == value.dtype and torch.equal(one[key], value)
        if isinstance(value, Tensor) and isinstance(one[key], Tensor)
        else type(one[key]) is type(value)
        for key, value in other.items()
    )
