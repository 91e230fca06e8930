"""The page of a tier in docs/: its table, what was wanted, tuning, and the matrices."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

from continual_parts.ablation import ablation_lines
from continual_parts.cells import cells
from continual_parts.measures import MEASURES, Result, measurable
from continual_parts.methods import METHODS
from continual_parts.report import (
    Group,
    by_seed,
    find_group,
    mean_interval,
    paired,
    report_lines,
    reported,
    shown,
)
from continual_parts.tiers import TIERS


def page_lines(tier: str, results: Sequence[Result], picture: str) -> list[str]:
    """Return the page in Markdown; `picture` is the name of the file with the plots."""
    size, found = TIERS[tier], results[0]
    cells_of = [result["cell"] for result in results]
    seeds = sorted({cell["seed"] for cell in cells_of if cell["purpose"] == "report"})
    return [
        f"# Continual learning: the tier `{tier}`",
        "",
        f"Written by `python benchmarks/continual.py --tier {tier} --page docs` from the files in "
        f"`benchmarks/results/continual/{tier}`; measured on {found['hardware']}, torch "
        f"{found['versions']['torch']}, LeRobot {found['versions']['lerobot']}. [benchmarks.md](benchmarks.md"
        "#continual-learning) describes the comparison.",
        "",
        f"World `{size.world}`, {len(size.orders)} order{'s' * (len(size.orders) > 1)} of "
        f"{len(size.orders[0])} new task{'s' * (len(size.orders[0]) > 1)}, {size.steps} steps a stage with "
        f"{size.batch_size} samples (and as many anchors), {size.demonstrations} demonstrations a task, "
        f"{size.episodes} episodes a task. Settings are chosen with the seeds "
        f"{', '.join(map(str, size.tuning_seeds))} and their scenes; the seeds "
        f"{', '.join(map(str, seeds))} and theirs are reported (not all of every method: column *runs*): "
        "means over seeds, with Student's 95 % "
        "intervals. *New tasks*: success right after their stage; *NBT*: mean drop of success since a task "
        "was learned"
        + (" (the start policy's tasks count as the first)" if size.keeps_old else "")
        + "; *loss of earlier tasks*: its rise on held-out demonstrations, nats per token.",
        "",
        *report_lines(tier, results),
        "",
        f"![Success on new and on earlier tasks]({picture})",
        "",
        "## Against what was wanted",
        "",
        *_verdicts(tier, results),
        "",
        "## What each part gives",
        "",
        "Differences of success by seed, with Student's 95 % intervals: a row names what the first method "
        "has and the second lacks. Where an interval contains 0, these seeds show no effect.",
        "",
        *ablation_lines(tier, results),
        "",
        "## Tuning",
        "",
        *_tuning(tier, results),
        "",
        "## Matrices",
        "",
        "Success on each task (columns) after each stage (rows), means over the reported seeds of the first "
        "order.",
        *_matrices(tier, results),
    ]


def _verdicts(tier: str, results: Sequence[Result]) -> Iterator[str]:
    groups = reported(tier, results)
    best = {budget: name for name, budget in groups if METHODS[name].family == "kl"}
    yield "| KL from the teacher, as tuned | wanted | measured | |"
    yield "|---|---|---|---|"
    for budget, name in sorted(best.items()):
        own, replay = groups[name, budget], find_group(groups, "replay", budget)
        if replay is None:
            continue
        where = f"{budget} stored per task"
        gain = paired(own, groups[replay], MEASURES["all tasks"])
        mean, half = mean_interval(list(gain.values()))
        yield (
            f"| {where}: all tasks, minus replay | ≥ 0.05, interval above 0 | {shown(gain, sign='+')} | "
            f"{_met(mean >= 0.05 and mean - half > 0)} |"
        )
        mine, theirs = (_mean(g, "NBT") for g in (own, groups[replay]))
        lost = paired(own, groups[replay], MEASURES["NBT"])
        mean, half = mean_interval(list(lost.values()))
        yield (
            f"| {where}: NBT against replay's | at most half, interval below 0 | {mine:.2f} against "
            f"{theirs:.2f} ({shown(lost, sign='+')}) | {_met(mine <= theirs / 2 and mean + half < 0)} |"
        )
        if ("joint", 0) in groups:
            gap = _mean(groups["joint", 0], "all tasks") - _mean(own, "all tasks")
            yield f"| {where}: all tasks, below joint training | ≤ 0.05 | {gap:.2f} | {_met(gap <= 0.05)} |"
    few, many = (groups.get((best.get(budget, ""), budget)) for budget in (10, 100))
    if few and many:
        gap = _mean(many, "all tasks") - _mean(few, "all tasks")
        yield f"| 10 stored per task: all tasks, below 100 | ≤ 0.10 | {gap:.2f} | {_met(gap <= 0.10)} |"
    without = [found for (name, _), found in groups.items() if METHODS[name].observes]
    plain = groups.get(("sequential", 0))
    if many and plain and len(without) == 1:
        share = (_mean(without[0], "all tasks") - _mean(plain, "all tasks")) / (
            _mean(many, "all tasks") - _mean(plain, "all tasks")
        )
        yield (
            "| without old data: share of the gap between sequential and 100 stored | ≥ 0.5 | "
            f"{share:.2f} | {_met(share >= 0.5)} |"
        )


def _tuning(tier: str, results: Sequence[Result]) -> Iterator[str]:
    """Yield the table of all settings: means over the tuning seeds."""
    groups: dict[Group, list[Result]] = defaultdict(list)
    for result in results:
        cell = result["cell"]
        if cell["purpose"] == "tuning":
            groups[cell["method"], cell["budget"]].append(result)
    yield f"| setting | stored per task | runs | {' | '.join(MEASURES)} |"
    yield "|---" * (3 + len(MEASURES)) + "|"
    for one in dict.fromkeys((cell.method, cell.budget) for cell in cells(tier, ("tuning",))):
        if found := groups.get(one):
            values = " | ".join(f"{_mean(found, name):.2f}" for name in MEASURES)
            yield f"| {one[0]} | {one[1] or '–'} | {len(found)} | {values} |"


def _matrices(tier: str, results: Sequence[Result]) -> Iterator[str]:
    for (method, budget), found in reported(tier, results).items():
        first = [result for result in found if result["cell"]["order"] == 0]
        if not first or method == "joint":
            continue
        success = first[0]["success"]
        yield f"\n**{method}**" + (f", {budget} stored per task" if budget else "")
        yield f"\n| after | {' | '.join(success['tasks'])} |"
        yield "|---" * (1 + len(success["tasks"])) + "|"
        for i, name in enumerate(success["rows"]):
            means = [fmean(r["success"]["R"][i][j] for r in first) for j in range(len(success["tasks"]))]
            yield f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |"


def _mean(found: Sequence[Result], name: str) -> float:
    values = by_seed([result for result in found if measurable(name, result)], MEASURES[name])
    return fmean(values.values()) if values else float("nan")


def _met(met: bool) -> str:
    return "met" if met else "**not met**"
