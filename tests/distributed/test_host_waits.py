"""The host waits for the device once in every kind of step, besides what DeepSpeed does."""

from pathlib import Path

from registry import every

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
STEPS = 11
IN_TABLE = ("plain", "retention token_ce", "one gradient", "skipped", "evaluation")


def table_row(name: str) -> list[int]:
    """Return the numbers of a row of the table in the documents."""
    section = BENCHMARKS.read_text().partition("## Waits of the host")[2]
    row = next(line for line in section.splitlines() if line.startswith(f"| {name}"))
    return [int(cell) for cell in row.split("|")[2:-1]]


def of_package(values: dict[str, dict[str, int]], package: str) -> dict[str, int]:
    return {step: found.get(package, 0) for step, found in values.items()}


def assert_one_wait(values: dict[str, dict[str, int]]) -> None:
    assert len(values) == STEPS
    assert of_package(values, "craft_ds") == {step: int(step != "evaluation") for step in values}
    ours = of_package(values, "craft_ds")
    assert [ours[step] for step in IN_TABLE] == table_row("of craft-ds")
    assert {package for found in values.values() for package in found} <= {"craft_ds", "deepspeed"}


@every("host_waits")
def test_the_host_waits_once_per_step(ranks, name):
    for values in ranks[name].values:
        assert_one_wait(values)
        others = of_package(values, "deepspeed")
        stage = {"zero3": "ZeRO-3", "zero2": "ZeRO-2"}.get(ranks.kind)
        if stage is None:
            assert not any(others.values())
        else:
            assert [others[step] for step in IN_TABLE] == table_row(f"of DeepSpeed, {stage}")


def test_one_process_waits_once_per_step(reference):
    (values,) = reference["host_waits"].values
    assert_one_wait(values)
    assert not any(of_package(values, "deepspeed").values())
