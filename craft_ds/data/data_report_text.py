"""A data report as a table, as a few lines at the start of a run, and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from craft_ds.data.data_report import CameraReport, DataReport, DimensionReport, FieldReport
from craft_ds.data.data_verdicts import Finding
from craft_ds.data.token_samples import TokenLengths


def table(report: DataReport) -> Iterator[str]:
    """Yield the lines of a data set's table."""
    tokens = report.tokens
    yield (
        f"data set {report.name}: {_count(report.episodes, 'episode')}, {_count(report.frames, 'frame')}, "
        f"{report.fps:g} fps, {_count(len(report.tasks), 'task')}"
    )
    yield f"measured: {_measured(report)}"
    for camera in report.cameras:
        yield f"camera {_camera(camera)}"
    for field in report.fields:
        yield ""
        yield from _field(field)
    if tokens.prompts or tokens.actions:
        yield ""
    if tokens.prompts:
        yield f"prompt tokens: {_lengths(tokens.prompts)}; the state stands at the end and is cut first"
    if tokens.actions:
        yield f"action tokens: {_lengths(tokens.actions)}"


def summary(report: DataReport) -> str:
    """Return what a run prints of a report whose findings follow."""
    tokens = report.tokens
    parts = []
    for field in report.fields:
        inside = sum(one.clipped - one.clipped_own <= 0 and not one.moved for one in field.dimensions)
        parts.append(f"{field.key} {inside} of {len(field.dimensions)} dimensions within the statistics")
    if tokens.prompts:
        parts.append(f"prompts up to {tokens.prompts.max} of {tokens.prompts.limit} tokens")
    if tokens.actions:
        parts.append(f"action chunks up to {tokens.actions.max} of {tokens.actions.limit}")
    return f"data report ({_measured(report)}): {'; '.join(parts)}"


def as_json(reports: Sequence[DataReport], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return reports and findings as JSON values."""
    return {
        "datasets": [asdict(report) for report in reports],
        "findings": [finding._asdict() for finding in findings],
    }


def _measured(report: DataReport) -> str:
    parts = [f"{report.measured} of {_count(report.frames, 'frame')}"]
    if report.tokens.samples:
        parts.append(f"{report.tokens.samples} tokenized")
    if report.images.samples:
        parts.append(f"{report.images.samples} with images")
    return ", ".join(parts)


def _field(field: FieldReport) -> Iterator[str]:
    decoded = any(one.error is not None for one in field.dimensions)
    head = ["dimension", "min", "max", "mean", "std", "low", "high", "outside", "far"]
    head += ["error", "of std", "saturated"] if decoded else []
    rows = [head, *(_row(one, decoded=decoded) for one in field.dimensions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    count = f"; {field.non_finite} frames with NaN or Inf" if field.non_finite else ""
    limits = (
        "; low and high become -1 and 1" if field.statistics == "ok" else f", {field.statistics} statistics"
    )
    yield f"{field.key}, normalised by {field.mode}{limits if field.normalised else ''}{count}"
    for row in rows:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([f"  {first}", *others]).rstrip()


def _row(one: DimensionReport, *, decoded: bool) -> list[str]:
    numbers = [_number(value) for value in (one.min, one.max, one.mean, one.std, one.low, one.high)]
    cells = [one.name, *numbers, f"{one.clipped:.1%}", f"{one.far:.1%}"]
    if decoded:
        relative = "" if one.relative_error is None else f"{one.relative_error:.0%}"
        cells += [_number(one.error), relative, f"{one.saturated or 0:.1%}"]
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _lengths(lengths: TokenLengths) -> str:
    return f"max {lengths.max}, 99th percentile {lengths.p99}, limit {lengths.limit}; {lengths.cut:.1%} cut"


def _camera(camera: CameraReport) -> str:
    if camera.shape is None:
        return f"{camera.name}: missing, the policy has it"
    size = "x".join(map(str, camera.shape))
    if camera.policy_name is None or camera.policy_shape is None:
        return f"{camera.name}: {size}, not used by the policy"
    renamed = "" if camera.policy_name == camera.name else f" as {camera.policy_name}"
    return f"{camera.name}: {size}, for the policy{renamed} {'x'.join(map(str, camera.policy_shape))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
