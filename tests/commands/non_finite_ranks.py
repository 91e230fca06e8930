"""Training commands in one rank process, with losses that are non-finite on one rank in chosen passes.

Arguments: a JSON file with the flags of each command by name, a directory for what came of them, the
rank, and a JSON object: pass and factor of the loss by step.
"""

import json
import sys

import training_ranks

from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.engines.single import SingleEngine
from craft_ds.training import train_step, trainer

*_, victim, plan = sys.argv
sys.argv = sys.argv[:3]
spoilt = {int(step): (kind, float(factor)) for step, (kind, factor) in json.loads(plan).items()}
# The step and the pass that this rank is in.
now = {"step": -1, "rank": -1, "passes": 0, "kind": ""}


def note_step(seed, step, rank, _seed_step=trainer.seed_step):
    now.update(step=step, rank=rank, passes=0)
    _seed_step(seed, step, rank)


def note_pass(function, kinds):
    def noted(engine, batches, *loss, **options):
        now["kind"] = kinds[min(now["passes"], len(kinds) - 1)]
        now["passes"] += 1
        return function(engine, batches, *loss, **options)

    return noted


def spoil(engine_class, method):
    function = getattr(engine_class, method)

    def spoiling(self, batch, *loss):
        found = function(self, batch, *loss)
        kind, factor = spoilt.get(now["step"], ("", 1.0))
        if now["rank"] != int(victim) or now["kind"] != kind:
            return found
        return found._replace(total=found.total * factor)

    setattr(engine_class, method, spoiling)


def main() -> None:
    from craft_ds.engines.deepspeed import DeepSpeedEngine, init_distributed

    init_distributed()  # once for all commands: DeepSpeed keeps the first group of a process
    trainer.seed_step = note_step
    train_step.accumulate = note_pass(train_step.accumulate, ["task", "anchors"])
    train_step.measure = note_pass(train_step.measure, ["constraint"])
    for engine_class in (SingleEngine, FsdpEngine, DeepSpeedEngine):
        spoil(engine_class, "forward")
        spoil(engine_class, "evaluate")
    training_ranks.main()


if __name__ == "__main__":
    training_ranks.exit_without_teardown(main)
