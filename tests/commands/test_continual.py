"""`benchmarks/continual.py`: plans of all cells, tables of known results, and one tier for real."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import draccus
import pytest

from craft_ds.commands.sequence_plan import SequencePlan
from craft_ds.config.parser import parse_arguments
from craft_ds.worlds import teacher_directory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
PAGES = sorted((BENCHMARKS.parent / "docs").glob("continual_*.md"))

import continual  # noqa: E402
from continual_parts.cells import (  # noqa: E402
    SCENES,
    Cell,
    Places,
    cells,
    plan_of,
    recordings,
    settings_of,
)
from continual_parts.measures import MEASURES, measurable  # noqa: E402
from continual_parts.methods import METHODS  # noqa: E402
from continual_parts.page import page_lines  # noqa: E402
from continual_parts.plot import plot_tier  # noqa: E402
from continual_parts.report import chosen_settings, mean_interval, report_lines  # noqa: E402
from continual_parts.tiers import TIERS  # noqa: E402


@pytest.mark.parametrize("tier", TIERS)
def test_every_cell_is_a_valid_sequence_of_its_own(tier, tmp_path):
    found = cells(tier)
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        plan = plan_of(cell, Places.of(tmp_path, tier), tmp_path / "sequence")
        draccus.decode(SequencePlan, plan).validate()


def test_tuning_and_report_share_neither_seeds_nor_scenes():
    for tier in TIERS.values():
        reported = {*tier.seeds, *tier.more_seeds}
        assert not reported & {*tier.tuning_seeds}
        scenes = {
            purpose: {SCENES[purpose] + seed for seed in seeds}
            for purpose, seeds in (("report", reported), ("tuning", tier.tuning_seeds))
        }
        assert not scenes["report"] & scenes["tuning"]


def test_methods_that_matter_most_have_more_seeds():
    found = cells("metaworld", ("report",))
    assert {cell.seed for cell in found if cell.method == "kl_1"} == set(range(11, 19))
    assert {cell.seed for cell in found if cell.method == "agem"} == {11, 12, 13}


def test_methods_with_anchors_have_the_same_number_of_samples_and_steps(tmp_path, monkeypatch):
    for tier in (TIERS["cw5"], replace(TIERS["metaworld"], budgets=(100,))):
        monkeypatch.setitem(TIERS, "one", tier)
        plans = {
            cell.method: plan_of(cell, Places.of(tmp_path, "one"), tmp_path)
            for cell in cells("one", ("report",))
            if (cell.order, cell.seed) == (0, tier.seeds[0])
        }
        assert plans.keys() == set(tier.methods or METHODS)
        for name, plan in plans.items():
            method, start = METHODS[name], plan["start"]
            assert plan["train"]["steps"] == tier.steps * (len(tier.orders[0]) if name == "joint" else 1)
            assert ("anchors" in plan) == (method.stores or method.observes)
            known = len(start.get("tasks", []))
            if method.observes:
                assert ("repo_id" in start, plan["anchors_from"]) == (False, "observations")
                assert len(start["instructions"]) == known
                assert plan["anchors"]["num_samples"] == 100 * (known + len(tier.orders[0]) - 1)
            elif method.stores:
                assert plan["anchors"]["num_samples"] == 100 * max(known, 1)


@pytest.mark.parametrize("name", METHODS)
def test_the_flags_of_a_method_are_accepted(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["craft-ds"])
    method = METHODS[name]
    cache = ["--craft.anchor_cache_dir=cache"] * (method.stores or method.observes)
    flags = [f"--{flag}={json.dumps(value).strip(chr(34))}" for flag, value in method.train.items()]
    teacher = [f"--policy.path={teacher_directory('blocks')}", "--dataset.repo_id=a/b"]
    config = parse_arguments([*teacher, *cache, *flags])
    config.craft.validate()
    config.penalty.validate(config.craft)
    assert config.craft.enabled == (bool(cache) and method.replays)
    assert (config.craft.retention_loss == "teacher_kl") == (
        "teacher_kl" in method.anchors.get("targets", [])
    )


def test_tiers_of_one_world_share_data_and_start_policy(tmp_path):
    five, ten = Places.of(tmp_path, "cw5"), Places.of(tmp_path, "cw10")
    assert (five.data, five.heldout, five.start) == (ten.data, ten.heldout, ten.start)
    assert five.runs != ten.runs
    shared = recordings(TIERS["cw5"], five.data).items()
    assert shared <= recordings(TIERS["cw10"], ten.data).items()
    [cell, *_] = cells("cw5")
    for stage in plan_of(cell, five, tmp_path)["stages"]:
        assert Path(stage["root"]).parent in dict(shared)
    assert [*recordings(TIERS["metaworld"], five.data).values()] == [[]]


def test_a_result_of_other_settings_counts_as_missing(tmp_path, monkeypatch):
    [cell, *_] = cells("smoke")
    places = Places.of(tmp_path, "smoke")
    settings = settings_of(cell, plan_of(cell, places, tmp_path))
    (tmp_path / f"{cell.name}.json").write_text(json.dumps({"settings": settings}))
    assert continual.is_done(tmp_path, cell, places)
    monkeypatch.setitem(TIERS, "smoke", replace(TIERS["smoke"], demonstrations=41))
    assert not continual.is_done(tmp_path, cell, places)


def result(method, *, purpose="report", seed=11, order=0, budget=100, last=(0.5, 0.5), before=0.8):
    """Result of two stages of a task each, the first of which was solved with `before` after it."""
    cell = {"method": method, "purpose": purpose, "seed": seed, "budget": budget, "order": order}
    settings = {"keeps": [], "stages": [{"tasks": ["a"]}, {"tasks": ["b"]}]}
    matrix = [[0.0, 0.0], [before, 0.0], list(last)]
    losses = [[3.0, 3.0], [0.5, 3.0], [0.75, 0.5]]
    return {
        "cell": cell,
        "settings": settings,
        "success": {"tasks": ["a", "b"], "rows": ["start", "a", "b"], "R": matrix},
        "loss": {"R": losses},
        "hardware": "a machine",
        "versions": {"torch": "2", "lerobot": "1"},
    }


def test_measures_of_a_sequence_and_of_one_task_beside_those_of_the_start():
    own = result("kl_1", last=(0.6, 0.9))
    assert {name: round(value(own), 4) for name, value in MEASURES.items()} == {
        "all tasks": 0.75,
        "earlier tasks": 0.6,
        "new tasks": 0.85,
        "NBT": 0.2,
        "loss of earlier tasks": 0.25,
    }
    settings = {"keeps": ["a", "b", "c"], "stages": [{"tasks": ["d"]}]}
    rows = {"R": [[1.0, 0.8, 0.6, 0.0], [0.9, 0.7, 0.2, 0.8]]}
    kept = own | {"settings": settings, "success": rows, "loss": {"R": [[0.5, 4.0], [0.75, 0.7]]}}
    assert {name: round(value(kept), 4) for name, value in MEASURES.items()} == {
        "all tasks": 0.65,
        "earlier tasks": 0.6,
        "new tasks": 0.8,
        "NBT": 0.2,
        "loss of earlier tasks": 0.25,
    }
    assert measurable("NBT", kept)
    assert not measurable("loss of earlier tasks", kept | {"loss": None})
    assert not measurable("earlier tasks", result("joint"))


def test_intervals_are_students():
    mean, half = mean_interval([0.1, 0.2, 0.3])
    assert (mean, half) == pytest.approx((0.2, 4.302653 * 0.1 / math.sqrt(3)))
    assert math.isnan(mean_interval([0.5])[1])


REPLAY_TUNING = [
    result("replay_0.1", purpose="tuning", seed=1, last=(0.9, 0.1)),
    result("replay_0.3", purpose="tuning", seed=1, last=(0.2, 0.1)),
    result("replay_1", purpose="tuning", seed=1, last=(0.8, 0.6)),
]
REPORTED = [
    *(result("replay_0.1", seed=seed, last=(1.0, 1.0)) for seed in (11, 12)),
    # Two orders of one seed are one value, 0.5.
    result("replay_1", seed=11, last=(0.3, 0.5)),
    result("replay_1", seed=11, order=1, last=(0.5, 0.7)),
    result("replay_1", seed=12, last=(0.6, 0.8)),
    result("kl_every_5", seed=11, last=(0.6, 0.8)),
    result("kl_every_5", seed=12, last=(0.8, 1.0)),
]


def rows(results):
    lines = report_lines("cw5", results)
    return lines, {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def test_the_report_shows_the_setting_that_tuning_chose_and_pairs_it_with_replay():
    assert chosen_settings("cw5", [*REPLAY_TUNING, *REPORTED]) == {("replay", 100): "replay_1"}
    _, shown = rows([*REPLAY_TUNING, *REPORTED])
    assert "replay_0.1" not in shown
    assert "| 3 | 0.60 ± 1.27 |" in shown["replay_1"]
    assert "| +0.20 ± 0.00 | -0.20 ± 0.00 |" in shown["kl_every_5"]


def test_without_complete_tuning_all_settings_are_shown_and_none_is_the_reference():
    lines, shown = rows([*REPLAY_TUNING[1:], *REPORTED])
    assert {"replay_0.1", "replay_1"} <= shown.keys()
    assert "+0.20" not in shown["kl_every_5"]
    assert any("Tuning of replay with 100 stored samples per task is incomplete" in line for line in lines)


KL_TUNING = [
    result(f"kl_{weight}", purpose="tuning", seed=1, last=(0.9, value))
    for weight, value in (("0.3", 0.6), ("1", 0.9), ("3", 0.7))
]


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "met"), (0.04, "**not met**")])
def test_the_page_says_what_was_met(gain, verdict, tmp_path):
    seeds = (11, 12, 13)
    replay = [result("replay_1", seed=seed, last=(0.4 + seed / 1000, 0.5)) for seed in seeds]
    own = [result("kl_1", seed=seed, last=(0.4 + 2 * gain + seed / 1000, 0.5)) for seed in seeds]
    known = [*REPLAY_TUNING, *KL_TUNING, *replay, *own]
    page = page_lines("cw5", known, "plot.png")
    [line] = [line for line in page if line.startswith("| 100 stored per task: all tasks, minus replay")]
    assert line.endswith(f"| {gain:+.2f} ± 0.00 | {verdict} |")
    assert "| kl_3 | 100 | 1 | 0.80 | 0.90 | 0.75 | -0.10 | 0.25 |" in page
    assert f"| b | {0.4 + 2 * gain + 0.012:.2f} | 0.50 |" in page
    parts = [line for line in page if " − " in line]
    [target] = parts  # of the others, one of the two methods has no results
    assert target.startswith("| target: the teacher's distribution")
    assert f"| kl_1 − replay_1 | 100 | 3 | {gain:+.2f} ± 0.00 |" in target
    plot_tier("cw5", known, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_documents_is_that_of_the_results(page, monkeypatch, tmp_path):
    tier = page.stem.removeprefix("continual_")
    monkeypatch.setattr(sys, "argv", ["continual.py", f"--tier={tier}", f"--page={tmp_path}"])
    continual.main()
    assert (tmp_path / page.name).read_text() == page.read_text(), f"run it with --tier {tier} --page docs"


def test_the_evaluation_of_the_start_is_shared_by_methods_but_not_by_scenes(tmp_path):
    files = {}
    for cell in cells("metaworld"):
        name = continual.start_evaluation(plan_of(cell, Places.of(tmp_path, "metaworld"), tmp_path))
        files.setdefault((cell.purpose, cell.seed, cell.method == "joint"), set()).add(name)
    assert all(len(names) == 1 for names in files.values())
    assert len(set.union(*files.values())) == len(files)


def test_a_later_cell_takes_over_the_evaluation_of_the_start(tmp_path, monkeypatch):
    """The first cell of a start policy evaluates it; the sequence of the next one finds that complete."""
    evaluated = []

    def sequence(command, **_):
        plan = json.loads(Path(command[-1]).read_text())
        start = Path(plan["output_dir"]) / "00_start" / "eval.json"
        if not start.exists():
            evaluated.append(Path(command[-1]).parent.name)
            start.parent.mkdir(parents=True)
            start.write_text(json.dumps({"success": 0.5}))
        success = {"tasks": ["a"], "rows": ["start"], "R": [[json.loads(start.read_text())["success"]]]}
        (Path(plan["output_dir"]) / "success.json").write_text(json.dumps(success | {"metrics": {}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(continual.subprocess, "run", sequence)
    places, results = Places.of(tmp_path, "smoke"), tmp_path / "results"
    first, second, *_ = cells("smoke")
    for cell in (first, second):
        assert continual.run_cell(cell, places, results)
        assert continual.read_result(results, cell)["success"]["R"] == [[0.5]]
        assert not (places.runs / cell.name / "sequence").exists()
    assert evaluated == [first.name]
    assert len([*places.runs.glob("start_*.json")]) == 1


@pytest.mark.parametrize("known", [REPLAY_TUNING, REPLAY_TUNING[1:]])
def test_only_what_tuning_chose_is_run_for_the_report(known, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(continual, "prepare", lambda tier, places: None)
    monkeypatch.setattr(continual, "run_cells", lambda missing, *_: ran.extend(missing) or [])
    for found in known:
        cell = Cell(
            "cw5", **{name: found["cell"][name] for name in ("method", "budget", "order", "seed", "purpose")}
        )
        settings = settings_of(cell, plan_of(cell, Places.of(tmp_path, "cw5"), tmp_path))
        (tmp_path / "cw5").mkdir(exist_ok=True)
        (tmp_path / "cw5" / f"{cell.name}.json").write_text(json.dumps({**found, "settings": settings}))

    def run(*flags):
        ran.clear()
        places = [f"--work={tmp_path}", f"--results={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["continual.py", "--tier=cw5", *places, *flags])
        continual.main()
        return {
            cell.method
            for cell in ran
            if cell.purpose == "report" and METHODS[cell.method].family == "replay"
        }

    every = {"replay_0.1", "replay_0.3", "replay_1"}
    assert run() == ({"replay_1"} if known is REPLAY_TUNING else every)
    assert run("--all_settings") == every


@pytest.mark.slow
@pytest.mark.sample(0)
@pytest.mark.parametrize("tier", ["smoke"])
def test_a_tier_runs_and_is_not_run_again(tier, tmp_path):
    command = [sys.executable, BENCHMARKS / "continual.py", "--tier", tier, "--purposes", "report"]
    places = ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    subprocess.run([*command, *places], check=True)
    results = [json.loads(path.read_text()) for path in (tmp_path / "results" / tier).iterdir()]
    assert {found["cell"]["method"] for found in results} == {*TIERS[tier].methods}
    again = subprocess.run([*command, *places, "--list"], check=True, capture_output=True, text=True)
    assert "missing" not in again.stdout
