"""craft-ds: constrained retention fine-tuning of sharded vision-language-action policies.

>>> from craft_ds import CraftConfig, train_craft  # doctest: +SKIP
>>> train_craft(cfg, craft_config=CraftConfig(enabled=True, anchor_cache_dir="data/anchor_cache"))
... # doctest: +SKIP
"""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from craft_ds.config.craft_config import CraftConfig
from craft_ds.errors import UserError

if TYPE_CHECKING:
    from craft_ds.config.train_config import TrainConfig
    from craft_ds.training.trainer import train_craft

# LeRobot logs several screens of loader tracebacks where FFmpeg is absent, then decodes with PyAV.
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)

__all__ = ["CraftConfig", "TrainConfig", "UserError", "__version__", "train_craft"]

try:
    __version__ = version("craft-ds")
except PackageNotFoundError:  # a checkout on the module path that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    # LeRobot and torch take seconds to import: only who trains pays for them.
    if name == "train_craft":
        from craft_ds.training.trainer import train_craft

        return train_craft
    if name == "TrainConfig":
        from craft_ds.config.train_config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
