"""The plan of a sequence of tasks, as dataclasses."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from craft_ds.config.checks import require
from craft_ds.config.datasets import DatasetSource, check_datasets
from craft_ds.config.presets import find_preset
from craft_ds.config.shipped_files import resolve_shipped
from craft_ds.worlds.tasks import TASKS, WORLDS

Flags = dict[str, Any]
"""Flags of a subcommand without dashes, with their values; groups may be nested: `craft: {enabled: true}`."""

START = "start"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_OWN_TRAIN_FLAGS = {
    "policy.path": "start.policy",
    "policy.pretrained_path": "start.policy",
    "datasets": "stages.N.datasets",
    "dataset.repo_id": "stages.N.repo_id",
    "dataset.root": "stages.N.root",
    "output_dir": "output_dir",
    "craft.anchor_cache_dir": "anchors",
    "engine": "launcher.engine",
    "engine.name": "launcher.engine",
    "engine.ds_config": "launcher.engine",
    "ds_config": "launcher.engine",
    "resume": "",
    "save_checkpoint": "",
    "config_path": "",
}
_OWN_ANCHOR_FLAGS = ("dataset_repo_id", "dataset_root", "policy_repo_id", "policy_path", "output_dir")


@dataclass
class HeldOut:
    """Held-out demonstrations, on which the loss is measured."""

    repo_id: str
    root: str | None = None


@dataclass
class Start:
    """The policy that the sequence starts from, and what it knows."""

    policy: str
    """Policy directory or hub id."""
    repo_id: str | None = None
    """Data of the tasks that it knows, of which anchors are built; none: it has nothing to keep."""
    root: str | None = None
    tasks: list[str] = field(default_factory=list)
    """Tasks of the world that it knows."""
    instructions: list[str] = field(default_factory=list)
    """Instructions of the tasks that it knows, for anchors from observations."""
    heldout: HeldOut | None = None

    @property
    def sources(self) -> list[DatasetSource]:
        """Return the data sets of what it knows."""
        return [] if self.repo_id is None else [DatasetSource(self.repo_id, self.root)]


@dataclass
class Stage:
    """One stage: the data to learn from, and how to measure what was learned."""

    name: str
    repo_id: str | None = None
    root: str | None = None
    datasets: list[DatasetSource] = field(default_factory=list)
    """A mixture, in place of `repo_id` and `root`."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of the world that this data teaches."""
    instructions: list[str] = field(default_factory=list)
    """Instructions of what it teaches, for anchors from observations."""
    heldout: HeldOut | None = None
    train: Flags = field(default_factory=dict)
    """Flags of `craft-ds train` for this stage; they replace those for all stages."""

    @property
    def sources(self) -> list[DatasetSource]:
        """Return the data sets to learn from."""
        return self.datasets or ([] if self.repo_id is None else [DatasetSource(self.repo_id, self.root)])


@dataclass
class Evaluation:
    """Measurement of all tasks after each stage."""

    world: str | None = None
    """World to run the policies in; none: only the losses on held-out data are measured."""
    episodes: int = 20
    """Episodes per task."""
    seed: int = 1000
    """Seed of the scenes."""
    every: int = 0
    """Steps between evaluations of a stage's own tasks while it trains; 0: none."""
    device: str = "cpu"
    references: list[str] = field(default_factory=list)
    """For each stage, the output directory of a sequence that learns it alone."""


@dataclass
class Launcher:
    """How `craft-ds train` is started on this machine."""

    engine: str = "single"
    """`single`, `fsdp`, or a DeepSpeed configuration: a file or a shipped name such as `zero3`."""
    ranks: int = 1


@dataclass
class SequencePlan:
    """A sequence of tasks to learn, one after the other."""

    output_dir: str
    start: Start
    stages: list[Stage]
    train: Flags = field(default_factory=dict)
    """Flags of `craft-ds train` for all stages."""
    anchors: Flags | None = None
    """Flags of `craft-ds anchors`; none: no anchors are built."""
    anchors_from: Literal["data", "observations"] = "data"
    """What anchors are built of before a stage: `data` of each task learned before, or, where that is gone,
    `observations` of the stage's own data under the instructions of all of them."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    launcher: Launcher = field(default_factory=Launcher)

    def flags_of(self, stage: Stage) -> Flags:
        """Return the flags of a stage's training run, without those that the sequence sets."""
        flags = flat_flags(self.train) | flat_flags(stage.train)
        if "craft.preset" in flags:
            return dict(find_preset(str(flags.pop("craft.preset"))).flags) | flags
        return flags

    def directory(self, number: int) -> Path:
        """Return the output directory of a stage, counted from 1; 0 is the start policy's."""
        name = self.stages[number - 1].name if number else START
        return Path(self.output_dir) / f"{number:02d}_{name}"

    def validate(self) -> None:
        """Check the plan without importing torch or reading data.

        Raises:
            UserError: Names the key and what to do.
        """
        require(bool(self.output_dir), "output_dir: must not be empty")
        require(bool(self.stages), "stages: give at least one stage")
        for name, count in Counter(stage.name for stage in self.stages).items():
            require(
                _NAME.fullmatch(name) is not None,
                f"stages: the name {name!r} must be letters, digits, `.`, `_` and `-`: it names a directory",
            )
            require(count == 1, f"stages: two are named {name}: rename one")
        for number, stage in enumerate(self.stages):
            require(
                (stage.repo_id is None) == bool(stage.datasets),
                f"stages.{number}: give repo_id, or datasets for a mixture",
            )
            require(
                stage.root is None or stage.repo_id is not None,
                f"stages.{number}.root: has no effect with datasets: give root in its entries",
            )
            check_datasets(stage.datasets)
        self._check_instructions()
        self._check_flags()
        self._check_evaluation()
        require(self.launcher.ranks >= 1, f"launcher.ranks: {self.launcher.ranks} must be at least 1")
        if self.launcher.engine == "single":
            require(
                self.launcher.ranks == 1,
                f"launcher.ranks: {self.launcher.ranks} needs an engine that shards: set launcher.engine to "
                "fsdp or zero3",
            )
        elif self.launcher.engine != "fsdp":
            resolve_shipped("--engine.ds_config", self.launcher.engine)
        require(
            self.start.root is None or self.start.repo_id is not None,
            "start.root: give start.repo_id too, any name for local data",
        )
        if self.anchors is None:
            require(
                self.start.repo_id is None,
                "start.repo_id has no effect without anchors: add anchors, or omit it",
            )

    @property
    def observes(self) -> bool:
        """True if anchors are observations of new tasks' data."""
        return self.anchors_from == "observations"

    def instructions_before(self, number: int) -> list[str]:
        """Return the instructions of what is learned before a stage, counted from 1."""
        of_stages = [text for stage in self.stages[: number - 1] for text in stage.instructions]
        return self.start.instructions + of_stages

    def _check_instructions(self) -> None:
        if not self.observes:
            for place, part in self.parts().items():
                require(
                    not part.instructions,
                    f"{place}.instructions: have no effect without anchors_from: observations: omit them",
                )
            return
        require(
            self.anchors is not None,
            "anchors_from: has no effect without anchors: add anchors, such as anchors: {num_samples: 1000}",
        )
        require(
            self.start.repo_id is None,
            "start.repo_id: has no effect with anchors_from: observations, whose anchors need no old data: "
            "omit it",
        )
        for number, stage in enumerate(self.stages[:-1]):
            require(
                bool(stage.instructions),
                f"stages.{number}.instructions: name those of its tasks, which later stages keep",
            )

    def _check_flags(self) -> None:
        places = {"train": self.train} | {
            f"stages.{number}.train": stage.train for number, stage in enumerate(self.stages)
        }
        for place, nested in places.items():
            flags = flat_flags(nested, place)
            for name, key in _OWN_TRAIN_FLAGS.items():
                advice = f"set {key} instead" if key else "omit it"
                require(name not in flags, f"{place}.{name}: the sequence sets this flag: {advice}")
            for name in flags:
                require(
                    not name.startswith("world."),
                    f"{place}.{name}: the sequence sets this flag: set evaluation instead",
                )
            require(
                not self.evaluation.every or {"eval_freq", "eval_steps"}.isdisjoint(flags),
                f"{place}.eval_freq: evaluation.every sets this flag: leave one of them out",
            )
            unread = self._unread_flags() & flags.keys()
            require(
                not unread,
                f"{place}.{min(unread, default='')}: has no effect with a preset that trains without CRaFT: "
                "omit it, or set craft.enabled: true",
            )
            if self.anchors is None:
                require(
                    flags.get("craft.enabled") is not True,
                    f"{place}.craft.enabled: needs anchors of the earlier stages: add anchors, such as "
                    "anchors: {num_samples: 1000}",
                )
        if self.anchors is not None:
            given = flat_flags(self.anchors, "anchors")
            for name in _OWN_ANCHOR_FLAGS:
                require(name not in given, f"anchors.{name}: omit it")
            require(
                not self.observes or "instructions" not in given,
                "anchors.instructions: set start.instructions and stages.N.instructions instead",
            )
            require(
                any(uses_anchors(self.flags_of(stage)) for stage in self.stages),
                "anchors: have no effect without CRaFT or EWC: add train.craft.enabled: true, or omit them",
            )
            for number, stage in enumerate(self.stages):
                place = f"stages.{number}.datasets" if stage.datasets else f"stages.{number}.train"
                chosen = "dataset.episodes" in self.flags_of(stage) or any(s.episodes for s in stage.datasets)
                require(
                    not chosen,
                    f"{place}: episodes cannot be chosen with anchors, which are drawn from all of them: "
                    "give data sets of these episodes alone, or omit anchors",
                )
            require(
                len(self.stages) > 1 or self.start.repo_id is not None or bool(self.start.instructions),
                "anchors: have no effect in a sequence of one stage from a policy without data: add "
                "start.repo_id, or leave them out",
            )

    def _unread_flags(self) -> set[str]:
        """Return the flags of CRaFT that only stages have whose preset trains without it."""
        read, unread = set[str](), set[str]()
        for stage in self.stages:
            given = flat_flags(self.train) | flat_flags(stage.train)
            preset = given.get("craft.preset")
            trains = preset is None or "craft.enabled" in given or self.flags_of(stage)["craft.enabled"]
            (read if trains else unread).update(name for name in given if name.startswith("craft."))
        return unread - read - {"craft.preset", "craft.anchor_cache_dir"}

    def _check_evaluation(self) -> None:
        evaluation, parts = self.evaluation, self.parts()
        if evaluation.world is None:
            tasks = [place for place, part in parts.items() if part.tasks]
            require(not tasks, f"{tasks[0] if tasks else ''}.tasks: needs evaluation.world")
            require(not evaluation.every, "evaluation.every: needs evaluation.world")
            heldout = self.stages[0].heldout
            require(
                heldout is not None,
                "evaluation: nothing is measured: give evaluation.world, or stages.N.heldout",
            )
        else:
            require(
                evaluation.world in WORLDS,
                f"evaluation.world: {evaluation.world} is unknown: choose one of {', '.join(WORLDS)}",
            )
            known = [task for split in TASKS[evaluation.world] for task in split]
            listed = Counter(task for part in parts.values() for task in part.tasks)
            for task, count in listed.items():
                require(
                    task in known, f"tasks: {evaluation.world} has no task {task}: choose {', '.join(known)}"
                )
                require(count == 1, f"tasks: {task} is listed twice: a task belongs to one stage")
        for number, stage in enumerate(self.stages):
            require(
                evaluation.world is None or bool(stage.tasks),
                f"stages.{number}.tasks: name the tasks of {evaluation.world} that this stage teaches",
            )
            require(
                (stage.heldout is None) == (self.stages[0].heldout is None),
                f"stages.{number}.heldout: give it for every stage or for none",
            )
        roots = {part.heldout.root is None for part in parts.values() if part.heldout is not None}
        require(len(roots) < 2, "heldout.root: give it for all held-out data or for none")
        require(evaluation.episodes >= 1, f"evaluation.episodes: {evaluation.episodes} must be at least 1")
        require(evaluation.seed >= 0, f"evaluation.seed: {evaluation.seed} must not be negative")
        require(evaluation.every >= 0, f"evaluation.every: {evaluation.every} must not be negative")
        if evaluation.references:
            require(
                len(evaluation.references) == len(self.stages) and bool(evaluation.every),
                "evaluation.references: give one directory per stage, and evaluation.every",
            )

    def parts(self) -> dict[str, Start | Stage]:
        """Return the start and the stages by their keys in the plan."""
        stages = {f"stages.{number}": stage for number, stage in enumerate(self.stages)}
        return {START: self.start, **stages}


def uses_anchors(flags: Flags) -> bool:
    """Return True if a training run with these flags reads anchors."""
    return flags.get("craft.enabled") is True or flags.get("penalty.name") == "ewc"


def flat_flags(flags: Mapping[str, Any], place: str = "train", prefix: str = "") -> Flags:
    """Return flags without nesting: names joined by dots.

    Raises:
        UserError: A flag has no value, or is given twice.
    """
    found: Flags = {}
    for name, value in flags.items():
        nested = isinstance(value, dict) and name != "rename_map"
        below = flat_flags(value, place, f"{prefix}{name}.") if nested else {}
        for key, leaf in (below or {f"{prefix}{name}": value}).items():
            require(leaf is not None, f"{place}.{key}: has no value: give it one, or omit it")
            require(key not in found, f"{place}.{key}: is given twice: remove one")
            found[key] = leaf
    return found


def flag_text(value: Any) -> str:
    """Return the value of a flag as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)
