"""Data sets in memory with the members that the data report reads, and small processors of any policy."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import ACTION, OBS_STATE

JOINTS = ("pan", "lift", "elbow", "gripper")
TEXT = "Press a button from the top"


def waves(episodes: int = 4, frames: int = 30, width: int = 4, amplitude: float = 0.4) -> np.ndarray:
    """Smooth movements, float32 (episodes, frames, width), within ±amplitude."""
    episode, frame, joint = np.ogrid[:episodes, :frames, :width]
    return (amplitude * np.sin(0.15 * frame + 2.1 * episode + 0.9 * joint)).astype(np.float32)


@dataclass(frozen=True)
class Robot:
    """A data set: states and actions (episodes, frames, width) and what else a report compares."""

    state: np.ndarray = field(default_factory=waves)
    action: np.ndarray = field(default_factory=waves)
    fps: int = 10
    state_names: Any = JOINTS
    action_names: Any = JOINTS
    tasks: tuple[str, ...] = (TEXT,)
    cameras: tuple[str, ...] = ("observation.images.top",)
    image: Any = None
    stats: Any = None

    def but(self, **changes: Any) -> "Robot":
        """The same with other fields."""
        return replace(self, **changes)

    def dataset(self) -> Any:
        """Return it as LeRobot opens it."""
        episodes, frames = self.state.shape[:2]
        index = np.arange(episodes * frames)
        rows = {
            OBS_STATE: self.state.reshape(len(index), -1).tolist(),
            ACTION: self.action.reshape(len(index), -1).tolist(),
            "episode_index": index // frames,
            "frame_index": index % frames,
            "task_index": (index // frames) % len(self.tasks),
        }
        features: dict[str, Any] = {
            OBS_STATE: {"shape": (self.state.shape[2],), "names": _listed(self.state_names)},
            ACTION: {"shape": (self.action.shape[2],), "names": _listed(self.action_names)},
        }
        features |= {name: {"shape": (64, 64, 3)} for name in self.cameras}
        meta = SimpleNamespace(
            features=features,
            camera_keys=list(self.cameras),
            fps=self.fps,
            stats=self.stats,
            tasks=pd.DataFrame({"task_index": range(len(self.tasks))}, index=list(self.tasks)),
        )
        return _DataSet(datasets.Dataset.from_dict(rows), meta, episodes, self.image)


class _DataSet:
    def __init__(self, rows: datasets.Dataset, meta: SimpleNamespace, episodes: int, image: Any):
        self.hf_dataset, self.meta, self.num_episodes, self._image = rows, meta, episodes, image

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if self._image is not None:
            return {name: self._image(row) for name in self.meta.camera_keys}
        return {name: np.arange(12.0).reshape(3, 2, 2) for name in self.meta.camera_keys}


def _listed(names: Any) -> Any:
    return list(names) if isinstance(names, tuple) else names


def statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of a feature as LeRobot names them, (width,) each."""
    flat = values.reshape(-1, values.shape[-1])
    quantiles = {
        f"q{int(100 * share):02d}": np.quantile(flat, share, axis=0) for share in (0.01, 0.1, 0.9, 0.99)
    }
    return {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0), **quantiles}


def plain_policy(
    mode: NormalizationMode, robot: Robot | None, *, rename: dict[str, str] | None = None
) -> tuple[Any, PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Configuration and processors of a policy without tokenizers, with the statistics of a robot's data."""
    inputs = {
        OBS_STATE: PolicyFeature(FeatureType.STATE, (4,)),
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    }
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (4,))}
    stats = {OBS_STATE: statistics(robot.state), ACTION: statistics(robot.action)} if robot else None
    modes = {FeatureType.STATE: mode, FeatureType.ACTION: mode}
    config = SimpleNamespace(
        type="act",
        input_features=inputs,
        output_features=outputs,
        image_features={"observation.images.top": inputs["observation.images.top"]},
        action_delta_indices=list(range(8)),
    )
    before = PolicyProcessorPipeline(
        steps=[
            RenameObservationsProcessorStep(rename_map=rename or {}),
            NormalizerProcessorStep(features={**inputs, **outputs}, norm_map=modes, stats=stats),
        ]
    )
    after = PolicyProcessorPipeline(
        steps=[UnnormalizerProcessorStep(features=outputs, norm_map=modes, stats=stats)],
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return config, before, after
