"""The commands of a sequence, in order, each with the output that shows that it is complete."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from craft_ds.commands.sequence_plan import (
    START,
    SequencePlan,
    flag_text,
    flat_flags,
    uses_anchors,
)
from craft_ds.commands.subcommands import subcommand, training_command
from craft_ds.config.datasets import DatasetSource

FINAL = "final"


class Step(NamedTuple):
    """One command of a sequence.

    Attributes:
        title: Its name in the log.
        command: The command; running it again continues it, or makes its output again.
        output: The file that exists once the step is complete.
        measures: Number of the stage that it measures; None: it measures nothing.
    """

    title: str
    command: list[str]
    output: Path
    measures: int | None = None


def sequence_steps(plan: SequencePlan) -> Iterator[Step]:
    """Yield the steps of a validated plan.

    Caches of anchors stay as they were built: the teacher of a task's anchors is the policy that has just
    learned it. Of anchors from observations, it is the policy that the stage starts from.
    """
    policy = plan.start.policy
    yield _evaluation(plan, 0, policy)
    for number in range(1, len(plan.stages) + 1):
        yield from _anchors(plan, number, policy)
        yield _training(plan, number, policy)
        policy = str(run_directory(plan, number) / FINAL)
        yield _evaluation(plan, number, policy)


def run_directory(plan: SequencePlan, number: int) -> Path:
    """Return the output directory of a stage's training run."""
    return plan.directory(number) / "train"


def anchors_before(plan: SequencePlan, number: int) -> list[tuple[DatasetSource, Path]]:
    """Return the data sets of which anchors are built just before a stage, from 1, with their caches.

    They are those of the part before it, or with anchors from observations those of the stage itself.
    """
    if plan.anchors is None or (plan.observes and not plan.instructions_before(number)):
        return []
    part = number if plan.observes else number - 1
    sources, directory = (plan.stages[part - 1] if part else plan.start).sources, plan.directory(part)
    names = [f"anchors_{place}" for place in range(1, len(sources) + 1)] if len(sources) > 1 else ["anchors"]
    return [(source, directory / name) for source, name in zip(sources, names, strict=False)]


def anchor_caches(plan: SequencePlan, number: int) -> list[Path]:
    """Return the caches of the anchors that a stage trains with."""
    built = [number] if plan.observes else range(1, number + 1)
    return [cache for before in built for _, cache in anchors_before(plan, before)]


def evaluation_file(plan: SequencePlan, number: int) -> Path:
    """Return the file with the results of all tasks after a stage."""
    return plan.directory(number) / "eval.json"


def training_flags(plan: SequencePlan, number: int) -> list[str]:
    """Return the flags of a stage's run, except for the launcher, the policy and the output directory.

    A plan with anchors trains a stage without `craft.*` if nothing was learned before it.

    Args:
        plan: A validated plan.
        number: The stage, from 1.
    """
    stage, evaluation, caches = plan.stages[number - 1], plan.evaluation, anchor_caches(plan, number)
    flags = plan.flags_of(stage)
    if plan.anchors is not None and not caches:
        reads = ("craft.", "penalty.") if flags.get("penalty.name") == "ewc" else ("craft.",)
        flags = {name: value for name, value in flags.items() if not name.startswith(reads)}
    set_here: dict[str, Any] = {"dataset.repo_id": stage.repo_id}
    if stage.datasets:
        entries = [asdict(source) for source in stage.datasets]
        given = [{name: value for name, value in entry.items() if value is not None} for entry in entries]
        set_here = {"datasets": given}
    elif stage.root is not None:
        set_here["dataset.root"] = stage.root
    if caches and uses_anchors(flags):
        set_here["craft.anchor_cache_dir"] = ",".join(map(str, caches))
    if evaluation.every:
        set_here |= {
            "eval_freq": evaluation.every,
            "world.name": evaluation.world,
            "world.tasks": stage.tasks,
            "world.episodes": evaluation.episodes,
            "world.seed": evaluation.seed,
        }
    return [f"--{name}={flag_text(value)}" for name, value in (set_here | flags).items()]


def anchors_flags(plan: SequencePlan, number: int, source: DatasetSource, policy: str) -> list[str]:
    """Return the arguments of `craft-ds anchors` for a data set before a stage, but for the output."""
    arguments = [f"--dataset_repo_id={source.repo_id}"]
    if source.root is not None:
        arguments.append(f"--dataset_root={source.root}")
    arguments.append(f"--policy_path={policy}")
    if plan.observes:
        arguments += ["--instructions", *plan.instructions_before(number)]
    for name, value in flat_flags(plan.anchors or {}, "anchors").items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(flag_text, value)]
        elif value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            arguments.append(f"--{name}={flag_text(value)}")
    return arguments


def _training(plan: SequencePlan, number: int, policy: str) -> Step:
    run = run_directory(plan, number)
    command = [
        *training_command(plan.launcher.engine, plan.launcher.ranks),
        f"--policy.path={policy}",
        f"--output_dir={run}",
        "--resume=auto",
        *training_flags(plan, number),
    ]
    plain = plan.anchors is not None and not anchor_caches(plan, number)
    without = ", without craft.*: nothing was learned before" if plain else ""
    title = f"stage {number} of {len(plan.stages)}, {plan.stages[number - 1].name}: training{without}"
    return Step(title, command, run / FINAL / "manifest.json")


def _evaluation(plan: SequencePlan, number: int, policy: str) -> Step:
    evaluation, output = plan.evaluation, evaluation_file(plan, number)
    arguments = [f"--policy.path={policy}", f"--device={evaluation.device}", f"--output={output}"]
    parts = plan.parts().values()
    if evaluation.world is not None:
        arguments += [f"--world={evaluation.world}", f"--episodes={evaluation.episodes}"]
        arguments += [
            f"--seed={evaluation.seed}",
            "--tasks",
            *(task for part in parts for task in part.tasks),
        ]
    heldout = [part.heldout for part in parts if part.heldout is not None]
    if heldout:
        arguments += ["--dataset.repo_id", *(data.repo_id for data in heldout)]
        if any(data.root is not None for data in heldout):
            arguments += ["--dataset.root", *(str(data.root) for data in heldout)]
    name = plan.stages[number - 1].name if number else START
    return Step(f"evaluation of all tasks after {name}", subcommand("eval", *arguments), output, number)


def _anchors(plan: SequencePlan, number: int, policy: str) -> Iterator[Step]:
    for source, cache in anchors_before(plan, number):
        flags = anchors_flags(plan, number, source, policy)
        command = subcommand("anchors", f"--output_dir={cache}", *flags)
        yield Step(f"anchors of {source.repo_id}", command, cache / "metadata.json")
