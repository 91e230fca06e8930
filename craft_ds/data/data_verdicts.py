"""Judge a data report: errors where training cannot be right, warnings where it may not be.

Shares are judged beyond what the data set's own statistics would give: with quantiles, for example, 2 % of
the values clip by definition. So a data set passes for a policy with its own statistics. The thresholds are
`--data_report.*`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from lerobot.utils.constants import ACTION

from craft_ds.config.configs import DataCheck
from craft_ds.config.data_report import DataReportConfig
from craft_ds.data.data_report import DataReport, DimensionReport, FieldReport
from craft_ds.errors import UserError

_NAMED = 4
_RANGE_RATIO = 10.0
"""Ranges of two data sets that differ by more than this factor have other units: tasks of one robot differ
less, degrees and radians by 57."""

_STATISTICS = (
    "record in the policy's units and conventions, train with --normalization=dataset, or give the policy "
    "statistics of old and new data with `craft-ds statistics`"
)


class Finding(NamedTuple):
    """One line about a data set.

    Attributes:
        level: `error` or `warning`.
        text: What is wrong, where, and what to do.
        trainable: Training is possible nevertheless.
    """

    level: Literal["error", "warning"]
    text: str
    trainable: bool = True


def judge(report: DataReport, options: DataReportConfig, *, skips_bad_samples: bool = False) -> list[Finding]:
    """Judge one data set; the most certain causes come first.

    Args:
        report: The measurements.
        options: The thresholds.
        skips_bad_samples: Training replaces samples that are non-finite or cannot be read.
    """
    findings: list[Finding] = []
    for key in report.missing:
        text = "missing, but the policy reads it: choose a data set that has it"
        findings.append(_error(report, key, text)._replace(trainable=False))
    for field in report.fields:
        findings += _judge_values(report, field, skips_bad_samples=skips_bad_samples)
    for field in report.fields:
        ranges = list(_judge_ranges(report, field, options))
        findings += ranges
        if not any(finding.level == "error" for finding in ranges):  # which would be the cause
            findings += _judge_actions(report, field, options)
    findings += _judge_tokens(report, options)
    return [*findings, *_judge_images(report)]


def compare(old: DataReport, new: DataReport) -> list[Finding]:
    """Compare two data sets that one policy learns from.

    Args:
        old: The earlier data set.
        new: The later one; the findings are about it.
    """
    findings = []
    if old.fps != new.fps:
        findings.append(compare_fps(new.name, new.fps, old.name, old.fps))
    for field in new.fields:
        other = old.field(field.key)
        if other is None:
            continue
        names = [[dimension.name for dimension in one.dimensions] for one in (other, field)]
        if other.named and field.named and names[0] != names[1]:
            findings.append(compare_names(new.name, field.key, names[1], old.name, names[0]))
        elif len(names[0]) != len(names[1]):
            text = f"{len(names[1])} entries, but {len(names[0])} in {old.name}"
            findings.append(_error(new, field.key, f"{text}: choose data sets of one robot"))
        else:
            findings += _compare_ranges(old, other, new, field)
    return findings


def compare_fps(name: str, fps: float, old_name: str, old_fps: float) -> Finding:
    """Return the warning about two data sets of different frame rates."""
    text = (
        f"data set {name}: {fps:g} fps, but {old_fps:g} in {old_name}, so that an action chunk lasts "
        f"{old_fps / fps:.3g} times as long: record at {old_fps:g} fps or resample"
    )
    return Finding("warning", text)


def compare_names(
    name: str, key: str, names: Sequence[str], old_name: str, old_names: Sequence[str]
) -> Finding:
    """Return the finding about two data sets whose entries of a feature have other names or another order.

    An error for actions: the policy would send one joint's action to another. A warning for states.
    """
    if sorted(names) == sorted(old_names):
        pairs = enumerate(zip(names, old_names, strict=True))
        place, (one, other) = next(entry for entry in pairs if entry[1][0] != entry[1][1])
        text = f"another order than in {old_name} (entry {place} is {one}, there {other})"
    else:
        text = f"entries {_list(names)}, but {old_name} has {_list(old_names)}"
    level: Literal["error", "warning"] = "error" if key == ACTION else "warning"
    return Finding(level, f"data set {name}, {key}: {text}: record the same entries in the same order")


def enforce(findings: Iterable[Finding], mode: DataCheck) -> list[str]:
    """Return the warnings as lines; raise the errors, or return them too.

    Args:
        findings: From `judge` and `compare`.
        mode: `--data_check`; `warn` turns errors into warnings.

    Raises:
        UserError: With `error`, one line that has the first error and the number of the others.
    """
    findings = list(findings)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors and mode == "error":
        line = errors[0].text
        if len(errors) > 1:
            line += f" (and {len(errors) - 1} more: `craft-ds data-report` lists them)"
        if all(error.trainable for error in errors):
            line += "; --data_check=warn trains nevertheless"
        raise UserError(line)
    return [f"warning: {finding.text}" for finding in findings]


def _judge_values(report: DataReport, field: FieldReport, *, skips_bad_samples: bool) -> Iterator[Finding]:
    """Non-finite values, widths, missing statistics."""
    if field.non_finite:
        places = ", ".join(f"episode {episode} frame {frame}" for episode, frame in field.non_finite_at)
        more = ", …" if field.non_finite > len(field.non_finite_at) else ""
        text = f"{field.non_finite} of {report.frames} frames have NaN or Inf ({places}{more})"
        level = _warning if skips_bad_samples else _error
        yield level(report, field.key, f"{text}: repair them, or set --on_bad_sample=skip")
    width = len(field.dimensions)
    if field.policy_width not in (None, 1, width):
        names = _list([dimension.name for dimension in field.dimensions])
        text = f"{width} entries ({names}), but the policy has {field.policy_width}"
        text = f"{text}: choose a data set with the policy's state and action"
        yield _error(report, field.key, text)._replace(trainable=False)
    if field.statistics != "ok":
        has = "has no statistics for it" if field.statistics == "missing" else "its statistics are non-finite"
        text = f"the policy normalises it by {field.mode}, but {has}"
        advice = "train with --normalization=dataset, or make them with `craft-ds statistics`"
        yield _error(report, field.key, f"{text}: {advice}")
    if field.stale:
        text = f"values of {_list(field.stale)} exceed the range in the data set's own meta/stats.json"
        yield _warning(report, field.key, f"{text}: compute its statistics anew before you use them")


def _judge_ranges(report: DataReport, field: FieldReport, options: DataReportConfig) -> Iterator[Finding]:
    """Values outside of the policy's statistics."""
    alive = [one for one in field.dimensions if not one.dead]
    spans = [one.high - one.low for one in alive if one.high is not None and one.low is not None]
    typical = float(np.median(spans or [1.0]))
    moving = [one for one in field.dimensions if one.dead and one.moved > 1e-6 * max(1.0, abs(one.low or 0))]
    rare = [one for one in moving if one.dead_own and one.min < one.max]
    if rare:
        most = f"mostly {rare[0].low:.4g}, so that {field.mode} gives it no range"
        text = f"{most}, but {_range(rare[0])} at times{_others(rare, rare[0])}: normalise by MIN_MAX"
        yield _warning(report, _name(field, rare[0]), text)
    moving = [one for one in moving if one not in rare]
    lost = [one for one in moving if one.moved > options.dead_error * typical]
    for found, level in ((lost, _error), ([one for one in moving if one not in lost], _warning)):
        if found:
            worst = max(found, key=lambda one: one.moved)
            text = (
                f"does not move in the policy's statistics ({worst.low:.4g}), but is {worst.min:.4g} to "
                f"{worst.max:.4g} here{_others(found, worst)}: {_STATISTICS}"
            )
            yield level(report, _name(field, worst), text)
    far = [one for one in alive if one.far - one.far_own > options.far_error]
    if far:
        worst = max(far, key=_distance)
        yield _error(report, _name(field, worst), f"{_outside(worst, worst.far, far)}: {_STATISTICS}")
    if not field.clips:
        return
    clipped = [one for one in alive if one not in far and _clips(one) > options.clip_warning]
    share = float(np.mean([_clips(one) for one in field.dimensions]))
    if clipped and share > options.clip_error:
        worst = max(clipped, key=_clips)
        most = f"{share:.0%} of the values of {field.key} clip"
        text = f"{_outside(worst, worst.clipped, clipped)}, and {most}: {_STATISTICS}"
        yield _error(report, _name(field, worst), text)
    elif clipped:
        worst = max(clipped, key=_clips)
        text = f"{_outside(worst, worst.clipped, clipped)}; the policy reads them as the limit: {_STATISTICS}"
        yield _warning(report, _name(field, worst), text)


def _judge_actions(report: DataReport, field: FieldReport, options: DataReportConfig) -> Iterator[Finding]:
    """Actions that their own tokens do not decode to."""
    if field.dimensions[0].error is None:
        return
    if not report.tokens.whole_chunk:
        text = (
            "tokens of a full chunk decode to other actions over fewer steps: set --policy.n_action_steps to "
        )
        yield _error(report, field.key, f"{text}--policy.chunk_size")
        return
    if report.tokens.actions is not None and report.tokens.actions.cut > options.chunk_cut_error:
        return  # an error of its own
    saturated = [one for one in field.dimensions if (one.saturated or 0) > options.saturation_warning]
    share = float(np.mean([one.saturated or 0 for one in field.dimensions]))
    if saturated:
        worst = max(saturated, key=lambda one: one.saturated or 0)
        text = (
            f"{worst.saturated:.0%} of the chunks exceed what the action tokens can say (decoded with a mean "
            f"error of {worst.error:.3g}; data {_range(worst)}){_others(saturated, worst)}: {_STATISTICS}"
        )
        level = _error if share > options.saturation_error else _warning
        yield level(report, _name(field, worst), text)
    relative = [(one.relative_error, one) for one in field.dimensions if one.relative_error is not None]
    if relative and not saturated:
        median = float(np.median([ratio for ratio, _ in relative]))
        if median > options.resolution_error:
            ratio, worst = max(relative, key=lambda pair: pair[0])
            text = (
                f"the action tokens round the movement away (error {ratio:.0%} of its standard deviation, "
                f"{median:.0%} in the median dimension; data {_range(worst)}): {_STATISTICS}"
            )
            yield _error(report, _name(field, worst), text)


def _judge_tokens(report: DataReport, options: DataReportConfig) -> Iterator[Finding]:
    """Prompts and action chunks that are cut."""
    prompts, actions = report.tokens.prompts, report.tokens.actions
    if prompts is not None and prompts.cut > 0:
        limit = f"--policy.tokenizer_max_length={prompts.limit} (up to {prompts.max} tokens)"
        advice = "shorten the task texts or raise it"
        text = f"{prompts.cut:.0%} are longer than {limit} and lose the state, which ends them: {advice}"
        level = _error if prompts.cut > options.prompt_cut_error else _warning
        yield level(report, "prompts", text)
    if actions is not None and actions.cut > 0:
        limit = f"--policy.max_action_tokens={actions.limit} (up to {actions.max} tokens)"
        text = f"{actions.cut:.0%} of the chunks are longer than {limit} and lose their end: raise it"
        level = _error if actions.cut > options.chunk_cut_error else _warning
        yield level(report, "action", text)


def _judge_images(report: DataReport) -> Iterator[Finding]:
    """Cameras that are missing or show nothing, and frames that cannot be read."""
    for camera in report.cameras:
        if camera.shape is None:
            text = f"missing, but a camera of the policy ({_cameras(report)}): map its name by --rename_map"
            yield _warning(report, camera.name, text)
    for name in report.images.blank:
        text = f"one colour in all of {report.images.samples} sampled frames: check the camera"
        yield _warning(report, name, text)
    for episode, frame, reason in report.images.unreadable:
        text = f"cannot be read ({reason}): repair it, or set --on_bad_sample=skip"
        yield _warning(report, f"episode {episode} frame {frame}", text)


def _compare_ranges(
    old: DataReport, before: FieldReport, new: DataReport, field: FieldReport
) -> Iterator[Finding]:
    """Dimensions whose ranges differ by so much that their units may differ, or that do not overlap."""
    found: list[tuple[float, DimensionReport, DimensionReport]] = []
    for one, other in zip(field.dimensions, before.dimensions, strict=True):
        widths = sorted((one.max - one.min, other.max - other.min))
        ratio = widths[1] / widths[0] if widths[0] > 0 else 1.0
        apart = one.min > other.max + widths[1] or one.max < other.min - widths[1]
        if ratio > _RANGE_RATIO or (apart and widths[1] > 0):
            found.append((ratio, one, other))
    if found:
        _, one, other = max(found, key=lambda entry: entry[0])
        others = _others([entry[1] for entry in found], one)
        text = f"{_range(one)}, but {_range(other)} in {old.name}{others}: check the units"
        yield _warning(new, _name(field, one), text)


def _clips(dimension: DimensionReport) -> float:
    return dimension.clipped - dimension.clipped_own


def _distance(dimension: DimensionReport) -> float:
    low, high = dimension.low or 0.0, dimension.high or 0.0
    return max(dimension.max - high, low - dimension.min) / max(high - low, 1e-12)


def _outside(worst: DimensionReport, share: float, found: Sequence[DimensionReport]) -> str:
    limits = "" if worst.low is None else f" of {worst.low:.4g} to {worst.high:.4g}"
    others = _others(found, worst)
    return (
        f"{share:.0%} of the values are outside of the policy's range{limits} (data {_range(worst)}){others}"
    )


def _range(dimension: DimensionReport) -> str:
    return f"{dimension.min:.4g} to {dimension.max:.4g}"


def _others(found: Sequence[DimensionReport], worst: DimensionReport) -> str:
    names = [one.name for one in found if one is not worst]
    return f"; likewise {_list(names)}" if names else ""


def _name(field: FieldReport, dimension: DimensionReport) -> str:
    return f"{field.key}[{dimension.name}]"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _cameras(report: DataReport) -> str:
    return "it has " + (", ".join(camera.name for camera in report.cameras if camera.shape) or "none")


def _error(report: DataReport, where: str, text: str) -> Finding:
    return Finding("error", f"data set {report.name}, {where}: {text}")


def _warning(report: DataReport, where: str, text: str) -> Finding:
    return Finding("warning", f"data set {report.name}, {where}: {text}")
