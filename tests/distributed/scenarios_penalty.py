"""Penalties and the moving average of the weights: the same on every number of ranks, also when resumed."""

from lab import Lab, Output, masters, moments
from scenarios import _steps, _train_config, load_checkpoint
from scenarios_lora import PLAIN, adapters_of

from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.checkpoints import save_checkpoint
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.engines.base import Batch, Engine, ReadRange
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.weights import WeightReader
from craft_ds.training.penalty import build_penalty
from craft_ds.training.weight_average import WeightAverage, build_average

DECAY = 0.7
WEIGHTS = {"l2": 3.0, "ewc": 0.3}


def penalised(lab: Lab, name: str, dtype: str = "float32") -> Output:
    """Six steps of the small policy; F of `task_only` is zero, since anchors do not use it."""
    engine, output = lab.toy_engine(dtype=dtype, persistence=0), Output()
    samples = [lab.whole(lab.toy_batches, number, retention=True) for number in (50, 51)]
    penalty = _penalty(engine, name, samples)
    _steps(
        engine,
        lambda step: lab.toy_batches(step, 2),
        lambda step: lab.toy_batches(step, 3, retention=True),
        output,
        "TRTRRT",
        0.5,
        penalty=penalty,
    )
    output.add("parameters", masters(engine))
    output.add("moments", moments(engine))
    engine.close()
    return output


def penalised_adapters(lab: Lab) -> Output:
    """Five steps of adapters, which are all that is drawn back."""
    engine, _ = lab.lora_engine(PLAIN, adapters_of(lab, "plain"), persistence=0)
    output = Output()
    penalty = _penalty(engine, "ewc", [lab.whole(lab.pi0_batches, 200)])
    _run(lab, engine, output, penalty, "RTRRT")
    output.add("parameters", (part for part in masters(engine) if "lora_" in part[0]))
    output.add("moments", moments(engine))
    engine.close()
    return output


def penalised_resume(lab: Lab) -> Output:
    """Three steps, a checkpoint, two more; and the same two again from the checkpoint. With an average."""
    output, directory = Output(), lab.scratch / f"penalised_{lab.kind}_on{lab.world_size}"
    engine = lab.pi0_engine()
    penalty = _penalty(engine, "ewc", [lab.whole(lab.pi0_batches, 200)])
    average = WeightAverage(DECAY, engine)
    for step, kind in enumerate("TRT"):
        _run(lab, engine, output, penalty, kind, first=step)
        average.update()
    save_checkpoint(
        directory,
        engine=engine,
        config=_train_config(lab),
        policy_dir=lab.policy_dir,
        scheduler_state=None,
        craft_state={"multiplier": 1.5},
        step=3,
        average=average.by_name(),
    )
    _finish(lab, engine, output, penalty, average, "unbroken")
    engine.close()
    _resume(lab, directory, output)
    return output


def penalised_load_from(lab: Lab, written_by: str) -> Output:
    """Resume from a checkpoint of another engine or number of ranks."""
    output = Output()
    _resume(lab, lab.scratch / f"penalised_{written_by}", output)
    return output


def _resume(lab: Lab, directory, output: Output) -> None:
    policy = build_policy(load_policy_config(lab.policy_dir), lab.policy_dir)
    with WeightReader(lab.policy_dir, policy) as start, WeightReader(directory, policy) as current:
        engine = lab.pi0_engine(directory)
        average = build_average(DECAY, engine, current.read, directory, None)
        assert average is not None
        samples = [lab.whole(lab.pi0_batches, 200)]
        penalty = _penalty(engine, "ewc", samples, start=start.read, current=current.read)
    load_checkpoint(directory, engine)
    _finish(lab, engine, output, penalty, average, "resumed")


def _finish(
    lab: Lab,
    engine: Engine,
    output: Output,
    penalty: QuadraticPenalty,
    average: WeightAverage,
    name: str,
) -> None:
    """Take the last two steps, and keep weights and average."""
    for step, kind in enumerate("RT", 3):
        _run(lab, engine, output, penalty, kind, first=step)
        average.update()
    output.add(name, masters(engine))
    parts = average.by_name()
    shards = engine.shards(frozen=False)
    output.add(name, ((f"{shard.name}.ema", shard.start, parts[shard.name]) for shard in shards))
    engine.close()


def _penalty(
    engine: Engine,
    name: str,
    samples: list[Batch],
    start: ReadRange | None = None,
    current: ReadRange | None = None,
) -> QuadraticPenalty:
    config = PenaltyConfig(name=name, weight=WEIGHTS[name])
    penalty = build_penalty(config, engine, samples, start=start, current=current)
    assert penalty is not None
    return penalty


def _run(
    lab: Lab, engine: Engine, output: Output, penalty: QuadraticPenalty, kinds: str, first: int = 0
) -> None:
    _steps(
        engine,
        lambda step: lab.pi0_batches(step, 1),
        lambda step: lab.pi0_batches(step + 100, 1),
        output,
        kinds,
        1.0,
        first,
        penalty=penalty,
    )
