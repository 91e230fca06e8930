"""Read a few frames of a data set with their images, to see that they decode and show something."""

from dataclasses import dataclass

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.data.tabular import TabularData
from craft_ds.errors import one_line

_LINE = 200


@dataclass(frozen=True)
class ImageSample:
    """Result of a sample.

    Attributes:
        samples: Number of frames that were read.
        blank: Cameras whose images have one colour in all of them.
        unreadable: (episode, frame, reason) of the frames that cannot be read.
    """

    samples: int = 0
    blank: tuple[str, ...] = ()
    unreadable: tuple[tuple[int, int, str], ...] = ()


def sample_images(dataset: LeRobotDataset, table: TabularData, samples: int) -> ImageSample:
    """Read evenly spaced frames.

    Args:
        dataset: The data set.
        table: Its tabular fields, for the names of the frames.
        samples: Number of frames.
    """
    cameras = list(dataset.meta.camera_keys)
    if not cameras or not samples or not len(table):
        return ImageSample()
    shown: set[str] = set()
    unreadable = []
    rows = np.unique(np.linspace(0, len(table) - 1, samples).round().astype(int)).tolist()
    for row in rows:
        try:
            with torch.random.fork_rng(devices=[]):  # image transforms draw random numbers
                frame = dataset[row]
        except Exception as error:  # decoders raise many types
            reason = one_line(error, limit=_LINE)
            unreadable.append((int(table.episode[row]), int(table.frame[row]), reason))
            continue
        shown |= {name for name in cameras if float(frame[name].max()) > float(frame[name].min())}
    read = len(rows) - len(unreadable)
    blank = tuple(name for name in cameras if read and name not in shown)
    return ImageSample(len(rows), blank, tuple(unreadable))
