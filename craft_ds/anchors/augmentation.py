"""Image augmentation of anchors, as a pure function of (seed, position in the stream)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from lerobot.transforms import ImageTransforms, ImageTransformsConfig

from craft_ds.engines.base import Batch
from craft_ds.errors import UserError, one_line


class AnchorAugmentation:
    """LeRobot's image transforms, drawn anew for each position of the stream of anchors.

    A resumed run and any number of ranks see the same images. The generators of the run are not used.

    Args:
        config: `--dataset.image_transforms.*`; its `enable` is not read.
        seed: Seed of the draws.

    Raises:
        UserError: The transforms cannot be built, or their list is empty.
    """

    def __init__(self, config: ImageTransformsConfig, seed: int) -> None:
        try:
            self._transform = ImageTransforms(replace(config, enable=True))
        except (TypeError, ValueError) as error:
            raise UserError(f"--dataset.image_transforms.tfs cannot be used: {one_line(error)}") from error
        if not self._transform.transforms or config.max_num_transforms < 1:
            raise UserError(
                "--craft.anchor_augmentation=lerobot has no effect: --dataset.image_transforms holds no "
                "transform with a weight, or --dataset.image_transforms.max_num_transforms is 0"
            )
        self._seed = seed

    def __call__(self, batch: Batch, cameras: Sequence[str], positions: Iterable[int]) -> None:
        """Transform the images of a batch in place, each camera by itself.

        Args:
            batch: Float images (B, C, H, W) in [0, 1] by camera, on any device.
            cameras: Names of the cameras.
            positions: Position in the stream of each of the B anchors.
        """
        images = {camera: list(batch[camera]) for camera in cameras}
        with torch.random.fork_rng(devices=[]):
            for row, position in enumerate(positions):
                state = np.random.SeedSequence((self._seed, position)).generate_state(1, np.uint64)
                # torch.manual_seed would also set the generators of GPUs, which are not restored.
                torch.random.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
                for camera in cameras:
                    images[camera][row] = self._transform(images[camera][row])
        batch |= {camera: torch.stack(transformed) for camera, transformed in images.items()}
