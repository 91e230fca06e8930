"""Scenarios for every number of ranks. A scenario builds its engine, runs steps, and returns its state.

Scenarios of `PARITY` run on the reference too and must give the same results.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from lab import FSDP, Lab, Output, craft_config, gradients, masters, moments
from lerobot.transforms import ImageTransformsConfig
from lerobot.utils.constants import ACTION_TOKEN_MASK
from torch import Tensor
from toy import TiedPolicy, ToyPolicy, toy_loss_by_task

import craft_ds.training.train_step
from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.anchors.augmentation import AnchorAugmentation
from craft_ds.anchors.cache_list import open_caches
from craft_ds.anchors.stream import AnchorStream
from craft_ds.checkpoints import load_optimizer, read_states, save_checkpoint, verify_checkpoint
from craft_ds.data.batch_partition import partition_step
from craft_ds.distributed.collectives import fail_together, rank0_only
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES
from craft_ds.policies.token_loss import Loss, token_loss
from craft_ds.policies.weights import WeightReader
from craft_ds.tensor_io.tensor_file import TensorFile
from craft_ds.testing.collective_counter import CollectiveCounter
from craft_ds.testing.datasets import write_test_cache
from craft_ds.training.joint_step import joint_step
from craft_ds.training.train_step import accumulate, measure, retention_step, task_step
from craft_ds.training.trainer import train

NEVER, ALWAYS = -1.0, 1.0
NO_CLIP = 0.0
FOLLOWED_BY = {"weighted": 0.7, "equal": 1.5, "task_priority": 2.0}


def surgery(lab: Lab, mode: str, threshold: float, dtype: str = "float32", **changes) -> Output:
    """One retention step that stops before the optimizer: triple, weights, merged gradient."""
    batches = lab.toy_batches(0, 1), lab.toy_batches(0, 1, retention=True)
    return operate(lab.toy_engine(dtype=dtype), *batches, mode, threshold, **changes)


def operate(engine: Engine, task: list, anchors: list, mode: str, threshold: float, **changes) -> Output:
    """Run surgery of any engine on any batches; name frozen parameters that have a gradient."""
    output = Output()

    def record() -> None:
        output.add("merged", gradients(engine))
        output.values["frozen"] = [
            name
            for name, parameter in engine.module.policy.named_parameters()
            if not parameter.requires_grad and parameter.grad is not None
        ]
        engine.zero_grad()

    engine.step = record  # type: ignore[method-assign]
    seen = retention_step(
        engine,
        task=task,
        anchors=anchors,
        constraint=None,
        multiplier=FOLLOWED_BY[mode],
        craft=craft_config(mode, threshold, **changes),
        max_norm=NO_CLIP,
    )
    output.values |= {"triple": list(seen.triple), "merge": list(seen.merged), "loss": seen.retention_loss}
    engine.close()
    return output


def _steps(
    engine: Engine,
    task,
    anchors,
    output: Output,
    kinds: str,
    max_norm: float,
    first: int = 0,
    anchor_loss: Loss = token_loss,
    penalty: QuadraticPenalty | None = None,
) -> None:
    """Run task and retention steps, `T` and `R`; every retention step uses another mode."""
    for step, kind in enumerate(kinds, first):
        if kind == "T":
            result = task_step(engine, task(step), max_norm, penalty=penalty)
        else:
            mode = list(FOLLOWED_BY)[step % 3]
            # Every other step measures the constraint on separate anchors.
            constraint = anchors(step + 50) if step % 2 else None
            config = craft_config(mode, threshold=0.0)
            result = retention_step(
                engine,
                task=task(step),
                anchors=anchors(step),
                constraint=constraint,
                multiplier=FOLLOWED_BY[mode],
                craft=config,
                max_norm=max_norm,
                anchor_loss=anchor_loss,
                penalty=penalty,
            )
            output.values[f"retention{step}"] = [result.retention_loss, *result.triple]
        assert result.applied
        output.values[f"step{step}"] = [result.loss, result.grad_norm, result.penalty_loss]


def trajectory(
    lab: Lab,
    accumulation: int,
    max_norm: float,
    persistence: int | None = None,
    dtype: str = "float32",
    tied: bool = False,
) -> Output:
    """Six steps of both kinds; parameters and moments at the end."""
    policy = TiedPolicy() if tied else ToyPolicy()
    engine, output = lab.toy_engine(policy, persistence=persistence, dtype=dtype), Output()
    output.add("loaded", masters(engine))
    dtypes: set[str] = set()
    engine.module.policy.trunk.register_forward_pre_hook(lambda m, _: dtypes.add(str(m.weight.dtype)))
    _steps(
        engine,
        lambda step: lab.toy_batches(step, accumulation),
        lambda step: lab.toy_batches(step, accumulation + 1, retention=True),
        output,
        "TRTRRT",
        max_norm,
    )
    output.add("parameters", masters(engine))
    output.add("moments", moments(engine))
    states = [
        tensor.dtype
        for shard in engine.shards(frozen=False)
        for tensor in (shard.master, *shard.state.values())
    ]
    output.values["dtypes"] = sorted(dtypes)
    output.values["master_dtypes"] = sorted({str(dtype) for dtype in states})
    engine.close()
    return output


def pi0(
    lab: Lab,
    accumulation: int,
    kinds: str = "TRR",
    recompute: bool = False,
    retention_loss: str = "token_ce",
) -> Output:
    """Run `trajectory` on a tiny pi0_fast."""
    persistence = 0 if accumulation > 1 else None
    engine, output = lab.pi0_engine(persistence=persistence, lr=1e-3, recompute=recompute), Output()
    _steps(
        engine,
        lambda step: lab.pi0_batches(step, accumulation),
        lambda step: lab.pi0_batches(step + 100, 2, retention_loss),
        output,
        kinds,
        max_norm=1.0,
        anchor_loss=RETENTION_LOSSES[retention_loss].loss,
    )
    output.add("parameters", masters(engine))
    output.add("moments", moments(engine))
    engine.close()
    return output


def anchor_stream(lab: Lab) -> Output:
    """Retention steps on anchors of two caches as one, with augmented images, from an `AnchorStream`."""
    root = lab.scratch / f"caches-{lab.kind}-{lab.world_size}-{lab.rank}"
    write_test_cache(root / "one", [0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2])
    write_test_cache(root / "two", [0, 2, 2, 2, 2], [0, 1, 2, 3, 4], [3, 4])
    partition = partition_step(7, lab.world_size, 2, "anchors")
    stream = AnchorStream(
        open_caches([str(root / "one"), str(root / "two")]),
        craft_config(),
        partition,
        device=torch.device("cpu"),
        rank=lab.rank,
        seed=3,
        augment=AnchorAugmentation(ImageTransformsConfig(), seed=3),
    )
    engine, output = lab.pi0_engine(lr=1e-3), Output()

    def anchors(step: int) -> list:
        batches = list(stream.gradient_batches(7 * step))
        supervised = sum(int(batch[ACTION_TOKEN_MASK][:, 1:].sum()) for batch in batches)
        assert stream.tokens(7 * step) == supervised > 0
        return batches

    _steps(engine, lambda step: lab.pi0_batches(step, 1), anchors, output, "RRT", max_norm=1.0)
    output.add("parameters", masters(engine))
    output.add("moments", moments(engine))
    engine.close()
    return output


def untouched(lab: Lab, *, zeroing: bool = True) -> Output:
    """Return the gradients of both passes; `zeroing=False` breaks the engine as DeepSpeed alone would."""
    engine, output = lab.toy_engine(), Output()
    if not zeroing:
        layout = engine._layout
        layout.clear_gradient = lambda: layout._zero.zero_grad(set_to_none=True)
    accumulate(engine, lab.toy_batches(0, 1))
    output.add("task", gradients(engine))
    engine.take_gradient()
    accumulate(engine, lab.toy_batches(0, 1, retention=True))
    output.add("retention", gradients(engine))
    engine.take_gradient()
    accumulate(engine, lab.toy_batches(0, 1))
    output.add("again", gradients(engine))
    engine.zero_grad()
    engine.close()
    return output


def _collectives(action: Callable[[], object]) -> list:
    with CollectiveCounter() as counter:
        action()
    return sorted([name, size, count] for (name, size), count in counter.seen.items())


def collectives(lab: Lab) -> Output:
    """Count the collectives of the steps, and those of their passes without surgery."""
    # Parameters are gathered, not kept, so that there is something to count.
    engine, output = lab.toy_engine(persistence=0), Output()
    task, anchors = lab.toy_batches(0, 2), lab.toy_batches(0, 2, retention=True)
    craft = craft_config()

    def task_only() -> None:
        task_step(engine, task, 1.0, extra=[0.0, 0.0])

    def retention() -> None:
        retention_step(
            engine,
            task=task,
            anchors=anchors,
            constraint=anchors,
            multiplier=1.0,
            craft=craft,
            max_norm=1.0,
            extra=[0.0, 0.0],
        )

    def retention_by_layer() -> None:
        retention_step(
            engine,
            task=task,
            anchors=anchors,
            constraint=anchors,
            multiplier=(1.0, 2.0, 3.0),
            craft=craft_config(surgery_scope="layer"),
            max_norm=1.0,
            anchor_loss=toy_loss_by_task,
            extra=[0.0, 0.0],
        )

    def joint() -> None:
        joint_step(
            engine,
            task=task,
            anchors=anchors,
            anchor_tokens=sum(int(batch["mask"].sum()) for batch in anchors),
            constraint=anchors,
            multiplier=1.0,
            craft=craft_config(use_grad_projection=False),
            max_norm=1.0,
            extra=[0.0, 0.0],
        )

    def passes_of_task() -> None:
        accumulate(engine, task)
        engine.step()

    def passes_of_retention() -> None:
        accumulate(engine, task)
        engine.zero_grad()
        accumulate(engine, anchors)
        measure(engine, anchors)
        engine.step()

    def baseline() -> None:
        run = SimpleNamespace(
            config=SimpleNamespace(craft=craft, steps=1, seed=0),
            engine=engine,
            dual=None,
            schedule=None,
            anchors=None,
            penalty=None,
            progress=SimpleNamespace(step=0),
            watchdog=SimpleNamespace(progress=lambda: None),
            votes=lambda: [0.0, 0.0],
            task_batches=lambda votes: task,
            count_bad_samples=lambda replaced: None,
            max_norm=1.0,
            advance_scheduler=lambda: None,
            update_average=lambda: None,
            record=lambda *_, **__: None,
            after_step=lambda **_: None,
            stopped_early=False,
        )
        train(run)  # type: ignore[arg-type]

    passes = (passes_of_task, passes_of_retention)
    actions = (task_only, retention, retention_by_layer, joint, *passes, baseline)
    for action in actions:
        # ZeRO-3 records the module order in one pass and prefetches by it in the next: warm up.
        for _ in range(3):
            task_only()
        output.values[action.__name__] = _collectives(action)
    engine.close()
    return output


def memory(lab: Lab) -> Output:
    """Return the peaks of both kinds of step, and the largest tensors that surgery allocates."""
    engine, output = lab.toy_engine(ToyPolicy(257, 1031), persistence=0), Output()
    # Anchors of the task's kind: if the two passes use different modules, ZeRO-3 discards its prefetch
    # order, and its own peak moves.
    task, anchors = lab.toy_batches(0, 1), lab.toy_batches(1, 1)
    craft = craft_config(threshold=ALWAYS)

    def plain() -> None:
        task_step(engine, task, 1.0)

    def retention() -> None:
        retention_step(
            engine, task=task, anchors=anchors, constraint=None, multiplier=1.0, craft=craft, max_norm=1.0
        )

    peaks: dict[str, list[int]] = {"plain": [], "retention": []}
    for action in (plain, retention) * 4:
        with MemoryCounter() as counter:
            action()
        peaks[action.__name__].append(counter.peak)
    # Without the first step. On a busy machine gloo's threads free buffers late: the least is the step's own.
    output.values |= {name: min(found[1:]) for name, found in peaks.items()}

    largest: dict[str, int] = {}

    def watched(name: str, function: Callable) -> Callable:
        def wrapper(*args):
            with MemoryCounter() as counter:
                result = function(*args)
            largest[name] = counter.largest
            return result

        return wrapper

    engine.take_gradient = watched("take_gradient", engine.take_gradient)  # type: ignore[method-assign]
    originals = {
        name: getattr(craft_ds.training.train_step, name) for name in ("gram", "merge_layers", "merge_")
    }
    try:
        for name, function in originals.items():
            setattr(craft_ds.training.train_step, name, watched(name, function))
        retention()
    finally:
        for name, function in originals.items():
            setattr(craft_ds.training.train_step, name, function)
    output.values["largest"] = largest
    output.values["shard"] = sum(part.numel() * 4 for part in engine.gradient())
    output.values["gradient"] = sum(
        getattr(p, "ds_numel", p.numel()) * 4 for p in engine.module.parameters() if p.requires_grad
    )
    engine.close()
    return output


def loading(lab: Lab) -> Output:
    """Count the elements that a rank reads from the file while its engine is built."""
    policy = build_policy(load_policy_config(lab.policy_dir), lab.policy_dir)
    total, read = sum(parameter.numel() for parameter in policy.parameters()), 0
    with WeightReader(lab.policy_dir, policy) as weights:

        def counted(name: str, start: int, stop: int) -> Tensor:
            nonlocal read
            read += stop - start
            return weights.read(name, start, stop)

        engine = lab.engine(policy, counted)
    engine.close()
    return Output(values={"read": read, "total": total, "replicas": engine.replicas})


def _continue(lab: Lab, engine: Engine, output: Output, kinds: str, first: int) -> None:
    _steps(
        engine,
        lambda step: lab.pi0_batches(step, 1),
        lambda step: lab.pi0_batches(step + 100, 1),
        output,
        kinds,
        1.0,
        first,
    )


def load_checkpoint(directory, engine: Engine, adapters=None) -> list:
    """Load the optimizer state into the engine; return schedule, CRaFT state and step."""
    manifest = verify_checkpoint(directory, engine.rank, engine.world_size)
    load_optimizer(directory, engine, adapters)
    return [*read_states(directory), manifest["step"]]


def _train_config(lab: Lab):
    from lerobot.configs.default import DatasetConfig

    from craft_ds.config.train_config import TrainConfig

    config = TrainConfig(dataset=DatasetConfig(repo_id="none"), policy=load_policy_config(lab.policy_dir))
    config.engine.name = "fsdp" if lab.kind in FSDP else "single" if lab.kind == "single" else "zero"
    return config


def save_and_resume(lab: Lab, optimizer_state: str = "fp32", name: str = "") -> Output:
    """Three steps, a checkpoint, two more; and the same two again from the checkpoint."""
    output, directory = Output(), lab.scratch / f"{name}{lab.kind}_on{lab.world_size}"
    engine = lab.pi0_engine(optimizer_state=optimizer_state)
    _continue(lab, engine, output, "TRT", 0)
    save_checkpoint(
        directory,
        engine=engine,
        config=_train_config(lab),
        policy_dir=lab.policy_dir,
        scheduler_state=None,
        craft_state={"multiplier": 1.5},
        step=3,
    )
    output.add("saved", masters(engine))
    output.add("saved", moments(engine))
    _continue(lab, engine, output, "RT", 3)
    output.add("unbroken", masters(engine))
    output.add("unbroken", moments(engine))
    engine.close()

    engine = lab.pi0_engine(directory, optimizer_state=optimizer_state)
    scheduler_state, craft_state, step = load_checkpoint(directory, engine)
    output.values["loaded"] = [scheduler_state, craft_state, step]
    output.add("loaded", masters(engine))
    output.add("loaded", moments(engine))
    _continue(lab, engine, output, "RT", 3)
    output.add("resumed", masters(engine))
    output.add("resumed", moments(engine))
    engine.close()
    return output


def load_from(lab: Lab, written_by: str, optimizer_state: str = "fp32") -> Output:
    """Resume from a checkpoint of other ranks, reading its parameters by shard."""
    output, directory = Output(), lab.scratch / written_by
    engine = lab.pi0_engine(optimizer_state=optimizer_state)
    with TensorFile(directory / "model.safetensors") as weights:
        engine.load_parameters(weights.read)
    load_checkpoint(directory, engine)
    output.add("loaded", masters(engine))
    output.add("loaded", moments(engine))
    _continue(lab, engine, output, "RT", 3)
    output.add("continued", masters(engine))
    engine.close()
    return output


def failing_rank(lab: Lab) -> Output:
    """Let one rank fail; return the error that every rank receives."""
    last = lab.world_size - 1

    def bad_input() -> None:
        if lab.rank == last:
            raise UserError("no such file")

    def bug() -> None:
        if lab.rank == last:
            raise KeyError("weight")

    def full_disk() -> None:
        raise OSError("no space left")

    received = {}
    for name, call in {
        "bad_input": fail_together(bad_input),
        "bug": fail_together(bug),
        "full_disk": rank0_only(full_disk),
    }.items():
        try:
            call()
            received[name] = None
        except Exception as error:
            received[name] = [type(error).__name__, str(error)]
    received["after"] = fail_together(lambda: lab.rank)()
    return Output(values=received)
