"""Learn tasks one after the other, and evaluate all of them after each stage.

    craft-ds sequence plan.yaml

Each stage trains from the policy of the stage before, with anchors of everything learned so far. Start the
command again to continue it: what is complete is kept. success.* and loss.* in OUTPUT_DIR hold R[i, j],
the result on task j after stage i, as JSON, CSV and a heat map. docs/sequences.md describes the plan.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from craft_ds.commands.sequence_file import read_plan
from craft_ds.commands.sequence_plan import SequencePlan
from craft_ds.commands.sequence_steps import (
    anchors_before,
    anchors_flags,
    sequence_steps,
    training_flags,
)
from craft_ds.commands.subcommands import call, fail
from craft_ds.errors import Preempted, UserError
from craft_ds.tensor_io.filesystem import atomic_file
from craft_ds.tensor_io.output_lock import locked_output


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds sequence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="YAML file")
    parser.add_argument("--dry_run", action="store_true", help="check the plan and print its commands")
    args = parser.parse_args(arguments)
    plan = read_plan(args.plan)
    with _naming(args.plan):
        check_runs(plan)
    if args.dry_run:
        for step in sequence_steps(plan):
            print(f"# {step.title}{' (complete)' if step.output.exists() else ''}")
            print(shlex.join(step.command))
        return
    with locked_output(Path(plan.output_dir), flag="output_dir"):
        keep_plan(plan)
        try:
            run_sequence(plan)
        except Preempted as notice:
            raise Preempted(f"{notice}: start the same command again to continue") from None


def run_sequence(plan: SequencePlan) -> None:
    """Run the steps that are not complete, and write the results after each evaluation."""
    from craft_ds.commands.sequence_report import summary_lines, write_report  # late: matplotlib

    reports = []
    for step in sequence_steps(plan):
        if step.output.exists():
            say(f"{step.title}: complete")
        else:
            say(step.title)
            call(step.command)
            if not step.output.exists():
                fail(f"{step.title}: the command has ended without {step.output}")
        if step.measures is not None:
            reports = write_report(plan, step.measures)
    for report in reports:
        print("\n".join(summary_lines(report)))
    say(f"done: {plan.output_dir}")


def check_runs(plan: SequencePlan) -> None:
    """Check the data and the flags of all stages, so that none is refused after hours of training.

    Raises:
        UserError: Names the key of the plan.
    """
    from craft_ds.commands.anchors import parse_arguments as parse_anchors
    from craft_ds.config.arguments import normalise_arguments
    from craft_ds.config.parser import parse_arguments
    from craft_ds.config.suggestions import refuse_misspelt_flags
    from craft_ds.data.dataset_files import check_dataset_root

    for key, part in plan.parts().items():
        roots = [(key, source.root) for source in part.sources]
        if part.heldout is not None:
            roots.append((f"{key}.heldout", part.heldout.root))
        for place, root in roots:
            if root is not None:
                check_dataset_root(root, f"{place}.root")
    engine = plan.launcher.engine
    for number in range(1, len(plan.stages) + 1):
        for source, cache in anchors_before(plan, number):
            with _naming("anchors"):
                arguments = anchors_flags(plan, number, source, plan.start.policy)
                parse_anchors([*arguments, f"--output_dir={cache}"])
        flags = [
            f"--engine={engine}" if engine in ("single", "fsdp") else f"--ds_config={engine}",
            f"--policy.path={plan.start.policy}",
            f"--output_dir={plan.directory(number) / 'check'}",
            *training_flags(plan, number),
        ]
        given = sys.argv[1:]
        try:
            with _naming(f"stages.{number - 1}.train"):
                refuse_misspelt_flags(normalise_arguments(flags))
                parse_arguments(flags).validate()
        finally:
            sys.argv[1:] = given


def keep_plan(plan: SequencePlan) -> None:
    """Write the plan into the output directory, or check that it is the one that was begun there.

    The launcher may differ: the number of ranks does not change the samples of a step.

    Raises:
        UserError: Another plan was begun; names the first key that differs.
    """
    from craft_ds.config.train_config import flat

    kept, own = Path(plan.output_dir) / "plan.json", json.loads(json.dumps(asdict(plan)))
    for name in ("output_dir", "launcher"):
        del own[name]
    if kept.exists():
        begun = json.loads(kept.read_text(encoding="utf-8"))
        before, now = (
            flat({**content, "stages": dict(enumerate(content["stages"]))}) for content in (begun, own)
        )
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"output_dir: {plan.output_dir} was begun with {name}: {before.get(name)}, and the plan "
                    f"has {now.get(name)}: choose another output_dir, or restore the plan"
                )
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    if any(kept.parent.iterdir()):
        raise UserError(f"output_dir: {plan.output_dir} holds something else: choose another directory")
    with atomic_file(kept) as temporary:
        temporary.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _naming(place: object) -> Iterator[None]:
    """Put the place in the plan before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def say(message: str) -> None:
    print(f"sequence: {message}", flush=True)
