"""The flags of the data report, `--data_report.*`. Imports neither torch nor LeRobot."""

from dataclasses import dataclass

from craft_ds.config.checks import require


@dataclass
class DataReportConfig:
    """How the data report samples and judges a data set: the flags `--data_report.*`.

    `craft-ds data-report` has the same flags without the prefix.
    """

    frames: int = 100_000
    """Most frames, evenly spaced, that shares are taken from. NaN and Inf are searched in all frames."""
    samples: int = 256
    """Action chunks and prompts, evenly spaced, that go through the policy's tokenizers; every task has at
    least one."""
    images: int = 4
    """Frames, evenly spaced, whose images are read; 0: none."""
    clip_warning: float = 0.05
    """Warn if more than this share of a dimension's values is clipped by the policy's statistics, beyond
    the share that the data set's own statistics would clip."""
    clip_error: float = 0.5
    """Error if more than this share of the values of a state or action is clipped, likewise."""
    far: float = 5.0
    """Distance from the centre of the policy's statistics beyond which a value is far outside, in multiples
    of half their range (with MEAN_STD, of three standard deviations). A factor between units is larger: 57
    for degrees against radians."""
    far_error: float = 0.01
    """Error if more than this share of a dimension's values is far outside, beyond the share of the data
    set's own statistics."""
    dead_error: float = 0.01
    """Error if a dimension in which the policy's statistics have no range moves by more than this share of
    the median range of the other dimensions; warning if it moves at all."""
    prompt_cut_error: float = 0.5
    """Error if more than this share of the prompts is cut at `tokenizer_max_length`; warning if any is."""
    chunk_cut_error: float = 0.05
    """Error if more than this share of the action chunks is cut at `max_action_tokens`; warning if any is."""
    saturation_warning: float = 0.05
    """Warn if more than this share of the chunks decodes to other actions than recorded, beyond
    quantisation, in a dimension."""
    saturation_error: float = 0.5
    """Error if more than this share of the chunks does so on average over the dimensions."""
    resolution_error: float = 0.7
    """Error if the median over dimensions of the error of decoded actions, divided by the actions' standard
    deviation, is larger: tokens then say little about the movement."""

    def validate(self) -> None:
        """Check every field for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        for name in ("frames", "samples"):
            value = getattr(self, name)
            require(value >= 1, f"--data_report.{name}={value} must be at least 1")
        for name in (
            "images",
            "clip_warning",
            "clip_error",
            "far_error",
            "dead_error",
            "prompt_cut_error",
            "chunk_cut_error",
            "saturation_warning",
            "saturation_error",
            "resolution_error",
        ):
            value = getattr(self, name)
            require(value >= 0, f"--data_report.{name}={value} must not be negative")
        require(self.far > 1, f"--data_report.far={self.far} must exceed 1")
