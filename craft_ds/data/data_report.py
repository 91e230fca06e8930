"""The data report: how a data set fits a policy's frozen processors. `data_measure` measures it."""

from dataclasses import dataclass

from lerobot.configs import NormalizationMode

from craft_ds.data.image_samples import ImageSample
from craft_ds.data.token_samples import TokenSample


@dataclass(frozen=True)
class DimensionReport:
    """One entry of a state or action.

    Attributes:
        name: Its name in the data set, or its index.
        min, max, mean, std: Statistics of the data; of finite values.
        low, high: What the policy's statistics map to -1 and 1; None without statistics.
        clipped: Share of values outside of them.
        clipped_own: The same share if the data set's own statistics were used.
        far: Share of values further outside than `--data_report.far`.
        far_own: The same share if the data set's own statistics were used.
        dead: The policy's statistics have no range here.
        dead_own: Nor would the data set's own statistics.
        moved: Largest distance of the data from a dead dimension's constant; else 0.
        error: Root mean square error of decoded actions, in the data's units; None where nothing is decoded.
        relative_error: `error` divided by the standard deviation of the recorded actions; None as `error`,
            and where they do not move.
        saturated: Share of chunks whose decoded actions differ from the recorded ones by more than
            quantisation; None as `error`.
    """

    name: str
    min: float
    max: float
    mean: float
    std: float
    low: float | None
    high: float | None
    clipped: float
    clipped_own: float
    far: float
    far_own: float
    dead: bool
    dead_own: bool
    moved: float
    error: float | None = None
    relative_error: float | None = None
    saturated: float | None = None


@dataclass(frozen=True)
class FieldReport:
    """A state or action feature.

    Attributes:
        key: Its name in the data set.
        mode: How the policy normalises it, such as MIN_MAX.
        clips: The policy cannot represent what lies outside of [-1, 1] after normalisation.
        named: The data set names the dimensions.
        policy_width: Entries that the policy's statistics have (without statistics: that its action tokens
            spell); None where it takes any.
        statistics: `ok`, `missing`, or `non-finite`.
        stale: Entries whose values exceed the range that the data set's own `meta/stats.json` has.
        non_finite: Number of frames with NaN or Inf.
        non_finite_at: (episode, frame) of the first few.
        dimensions: One per entry.
    """

    key: str
    mode: str
    clips: bool
    named: bool
    policy_width: int | None
    statistics: str
    stale: tuple[str, ...]
    non_finite: int
    non_finite_at: tuple[tuple[int, int], ...]
    dimensions: tuple[DimensionReport, ...]

    @property
    def normalised(self) -> bool:
        """True unless the policy takes the feature as it is."""
        return self.mode != NormalizationMode.IDENTITY.value


@dataclass(frozen=True)
class CameraReport:
    """A camera: its shape (height, width, channels) in the data set and in the policy; None where missing."""

    name: str
    shape: tuple[int, ...] | None
    policy_name: str | None
    policy_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class DataReport:
    """How a data set fits a policy.

    Attributes:
        name: The data set, as messages call it.
        fps: Frames per second.
        episodes: Episodes.
        frames: Frames; all of them are searched for NaN and Inf.
        measured: Frames that the shares are taken from.
        tasks: Task texts.
        fields: Its states and actions that the policy reads.
        missing: State and action features of the policy that it lacks.
        cameras: Cameras of the data set, then those of the policy that it lacks.
        tokens: Lengths of prompts and actions in tokens.
        images: A few frames with their images.
    """

    name: str
    fps: float
    episodes: int
    frames: int
    measured: int
    tasks: tuple[str, ...]
    fields: tuple[FieldReport, ...]
    missing: tuple[str, ...]
    cameras: tuple[CameraReport, ...]
    tokens: TokenSample
    images: ImageSample

    def field(self, key: str) -> FieldReport | None:
        """Return a feature by its name in the data set."""
        return next((field for field in self.fields if field.key == key), None)
