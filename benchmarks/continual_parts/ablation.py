"""What each part of a method gives: differences between a method that has it and one that lacks it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from continual_parts.measures import MEASURES, Result
from continual_parts.methods import METHODS
from continual_parts.report import Group, find_group, paired, reported, shown

_MEASURES = ("all tasks", "earlier tasks", "new tasks")


class Part(NamedTuple):
    """One part of a method.

    Attributes:
        name: Description.
        having: A method that has it, or a family, of which tuning chose the setting.
        lacking: A method or family that lacks it.
    """

    name: str
    having: str
    lacking: str


PARTS = (
    Part("target: the teacher's distribution, not the recorded actions", "kl", "replay"),
    Part("λ by ascent and projection at conflicts, not a tuned λ", "guide", "replay"),
    Part("hard projection in every step (A-GEM), not the sum", "agem", "replay"),
    Part("λ by νPI for 0.05 nats, not a tuned λ", "kl_adaptive", "kl"),
    Part("one λ per task", "kl_tasks", "kl_adaptive"),
    Part("anchors in every fifth step, not in every step", "kl_every_5", "kl_1"),
    Part("anchors of equal shares of motion phases, not uniform", "kl_phases", "kl_1"),
    Part("Fisher information, not equal weights", "ewc", "l2"),
)


def ablation_lines(tier: str, results: Sequence[Result]) -> Iterator[str]:
    """Yield the table in Markdown: the parts of which both methods have results with as many samples."""
    groups = reported(tier, results)
    yield f"| part | methods | stored per task | seeds | {' | '.join(_MEASURES)} |"
    yield "|---" * (4 + len(_MEASURES)) + "|"
    for part in PARTS:
        for budget in sorted({budget for _, budget in groups}):
            having, lacking = (find_group(groups, name, budget) for name in (part.having, part.lacking))
            if having and lacking:
                yield _row(part.name, groups, having, lacking)
    budgets = sorted({budget for name, budget in groups if METHODS[name].family == "kl"})
    for fewer, more in pairwise(budgets):
        having, lacking = (find_group(groups, "kl", budget) for budget in (more, fewer))
        if having and lacking:
            yield _row(f"{more} stored samples per task, not {fewer}", groups, having, lacking)


def _row(part: str, groups: dict[Group, list[Result]], having: Group, lacking: Group) -> str:
    differences = [paired(groups[having], groups[lacking], MEASURES[name]) for name in _MEASURES]
    stored = dict.fromkeys(budget for budget in (having[1], lacking[1]) if budget)
    cells = [
        part,
        f"{having[0]} − {lacking[0]}",
        ", ".join(map(str, stored)) or "–",
        str(len(differences[0])),
    ]
    return f"| {' | '.join([*cells, *(shown(each, sign='+') for each in differences)])} |"
