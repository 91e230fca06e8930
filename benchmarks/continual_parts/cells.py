"""Cells of the benchmark: one method on one order of tasks with one seed and budget, as a sequence to run."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual_parts.methods import METHODS
from continual_parts.tiers import TIERS, Tier
from craft_ds.worlds import make_world, teacher_directory
from craft_ds.worlds.tasks import TASKS

TRAINING_SEED, HELDOUT_SEED = 0, 7
"""Seeds of the demonstrations: those that are trained on, and those that losses are measured on."""
SCENES = {"report": 2000, "tuning": 3000}
"""Seeds of the evaluation scenes: settings are chosen on other scenes than those that are reported."""
HELDOUT_DEMONSTRATIONS = 5
OBSERVATIONS = 100
"""Observations of a new task per earlier one, for methods without old data."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        tier: Name of the tier.
        method: Name of the method.
        budget: Stored samples per task; 0: the method stores none.
        order: Number of the order of tasks.
        seed: Training seed.
        purpose: `report` or `tuning`.
    """

    tier: str
    method: str
    budget: int
    order: int
    seed: int
    purpose: str

    @property
    def name(self) -> str:
        """Name of the cell's files."""
        stored = f"_{self.budget}" if self.budget else ""
        return f"{self.purpose}_{self.method}{stored}_order{self.order}_seed{self.seed}"


@dataclass(frozen=True)
class Places:
    """Directories of a tier's work.

    Attributes:
        data: Demonstrations: of old and new tasks, or a directory for each task.
        heldout: Held-out demonstrations by task.
        start: The start policy.
        runs: A directory for each cell.
    """

    data: Path
    heldout: Path
    start: Path
    runs: Path

    @classmethod
    def of(cls, work: Path, name: str) -> "Places":
        """Return the places of a tier in a directory; tiers of a world share data and start policy."""
        world = TIERS[name].world
        start = teacher_directory(world) if TIERS[name].ships_start else work / f"{world}_start"
        return cls(work / f"{world}_data", work / f"{world}_heldout", start, work / f"{name}_runs")


def cells(name: str, purposes: tuple[str, ...] = ("tuning", "report")) -> list[Cell]:
    """Return the cells of a tier, in the order in which they run.

    Only methods of which tuning chooses a setting have tuning cells.
    """
    tier = TIERS[name]
    compared = tier.methods or tuple(METHODS)
    families = Counter(METHODS[method].family for method in compared)
    tuned = [method for method in compared if METHODS[method].family and families[METHODS[method].family] > 1]
    found = []
    for purpose in purposes:
        if purpose == "tuning":
            methods_by_seed = dict.fromkeys(tier.tuning_seeds, tuned)
        else:
            methods_by_seed = {seed: list(compared) for seed in tier.seeds}
            methods_by_seed |= {seed: ["sequential", *tuned] for seed in tier.more_seeds}
        for seed, methods in methods_by_seed.items():
            for order in range(len(tier.orders) if purpose == "report" else 1):
                for method in methods:
                    if method == "joint" and order:
                        continue
                    budgets = tier.budgets if METHODS[method].stores else (0,)
                    found += [Cell(name, method, budget, order, seed, purpose) for budget in budgets]
    return found


def plan_of(cell: Cell, places: Places, output: Path) -> dict[str, Any]:
    """Return the plan of a cell for `craft-ds sequence`."""
    tier, method = TIERS[cell.tier], METHODS[cell.method]
    joint = cell.method == "joint"
    start: dict[str, Any] = {"policy": str(places.start)}
    if tier.keeps_old:
        start["tasks"] = list(TASKS[tier.world].old)
        if not joint:
            start["heldout"] = _source(tier, places.heldout, "old")
        if cell.budget:
            start |= _source(tier, places.data, "old")
    tasks = tier.orders[cell.order]
    plan: dict[str, Any] = {
        "output_dir": str(output),
        "start": start,
        "stages": [_all_at_once(tier, places, tasks)] if joint else [_stage(tier, places, t) for t in tasks],
        "train": {
            "steps": tier.steps * (len(tasks) if joint else 1),
            "batch_size": tier.batch_size,
            "seed": cell.seed,
            "policy.optimizer_lr": tier.learning_rate,
            "policy.scheduler_warmup_steps": 0,
            "policy.device": "cpu",
            "num_workers": 0,
            "save_freq": 0,
            "log_freq": 50,
            **method.train,
        },
        "evaluation": {
            "world": tier.world,
            "episodes": tier.episodes,
            "seed": SCENES[cell.purpose] + cell.seed,
        },
    }
    if method.train["craft.preset"] == "l2" and not tier.keeps_old:
        plan["stages"][0]["train"] = {"craft.preset": "sequential"}  # nothing is to be kept yet
    if cell.budget or method.observes:
        plan["anchors"] = {"seed": cell.seed, "num_workers": 0, **method.anchors}
        known = len(start.get("tasks", []))
        if method.observes:
            plan["anchors_from"] = "observations"
            plan["anchors"]["num_samples"] = OBSERVATIONS * (known + len(tasks) - 1)
            for part in (start, *plan["stages"]):
                texts = map(make_world(tier.world).task_text, part.get("tasks", []))
                part["instructions"] = list(texts)
        else:
            # A cache has the samples of one task, and that of the start policy of all of its tasks.
            plan["anchors"]["num_samples"] = cell.budget * max(known, 1)
        if method.replays:
            plan["train"]["craft.anchor_batch_size"] = tier.batch_size
    return plan


def settings_of(cell: Cell, plan: dict[str, Any]) -> dict[str, Any]:
    """Return all that a result depends on besides the code: flags, tasks, data and start policy."""
    tier = TIERS[cell.tier]
    return {
        "stages": [{"tasks": stage["tasks"], "train": stage.get("train", {})} for stage in plan["stages"]],
        "keeps": plan["start"].get("tasks", []),
        "train": plan["train"],
        "anchors": plan.get("anchors"),
        **{name: plan[name] for name in ("anchors_from",) if name in plan},
        "evaluation": plan["evaluation"],
        "demonstrations": tier.demonstrations,
        "drift": tier.drift,
        "start": f"{'shipped' if tier.ships_start else 'pretrained'} policy of {tier.world}",
    }


def recordings(tier: Tier, root: Path) -> dict[Path, list[str]]:
    """Return the directories to record into with the flags of `craft-ds worlds record` for their tasks.

    Without a flag, a directory gets a data set of the old and one of the new tasks.
    """
    return {root: []} if tier.keeps_old else {root / task: ["--tasks", task] for task in tier.orders[0]}


def _stage(tier: Tier, places: Places, task: str) -> dict[str, Any]:
    name = "new" if tier.keeps_old else task
    heldout = _source(tier, places.heldout, name)
    return {"name": task, "tasks": [task], **_source(tier, places.data, name), "heldout": heldout}


def _all_at_once(tier: Tier, places: Places, tasks: tuple[str, ...]) -> dict[str, Any]:
    names = ("old", "new") if tier.keeps_old else tasks
    return {
        "name": "all",
        "tasks": list(tasks),
        "datasets": [_source(tier, places.data, name) for name in names],
    }


def _source(tier: Tier, root: Path, name: str) -> dict[str, str]:
    place = root / name if tier.keeps_old else root / name / name
    return {"repo_id": f"craft-ds/{tier.world}-{name}", "root": str(place)}
