"""LoRA on every number of ranks: adapters train as on one process, and nothing else does."""

from functools import partial

import torch
from lab import Lab, Output, craft_config, masters, moments
from scenarios import ALWAYS, _steps, _train_config, load_checkpoint, operate
from torch import nn

from craft_ds.checkpoints import save_checkpoint
from craft_ds.config.configs import LoraConfig
from craft_ds.engines.base import Engine
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.testing.collective_counter import CollectiveCounter
from craft_ds.training.train_step import accumulate, retention_step, task_step

PLAIN = LoraConfig(enabled=True, rank=4)
DORA = LoraConfig(enabled=True, rank=3, use_dora=True)
# Ranks that 2 and 3 do not divide, and a module that trains fully.
MIXED = LoraConfig(enabled=True, rank=5, use_rslora=True, preset="attention", modules_to_save=["lm_head"])
VISION = LoraConfig(enabled=True, rank=4, preset="attention_mlp_vision")
KINDS = {"plain": PLAIN, "dora": DORA, "mixed": MIXED, "vision": VISION}


def adapters_of(lab: Lab, kind: str):
    """Return the directory of random adapters of a kind, which have an effect from the first step."""
    return lab.scratch / f"adapters_{kind}"


def _run(lab: Lab, engine: Engine, output: Output, steps: str, accumulation: int = 1, first: int = 0) -> None:
    _steps(
        engine,
        lambda step: lab.pi0_batches(step, accumulation),
        lambda step: lab.pi0_batches(step + 100, 1),
        output,
        steps,
        1.0,
        first,
    )


def _trains(engine: Engine) -> set[str]:
    return {name for name, parameter in engine.module.policy.named_parameters() if parameter.requires_grad}


def _stored_dtype(parameter: nn.Parameter) -> str:
    return str(getattr(parameter, "ds_tensor", parameter).dtype)


def _what_frozen_parameters_have(engine: Engine) -> list[str]:
    """Return the names of frozen parameters that have gradients or optimizer state: there must be none."""
    trains = _trains(engine)
    found = [
        f"gradient of {name}"
        for name, parameter in engine.module.policy.named_parameters()
        if name not in trains and parameter.grad is not None
    ]
    return found + [f"state of {s.name}" for s in engine.shards() if s.name not in trains and s.state]


def lora_surgery(lab: Lab, mode: str) -> Output:
    """One retention step that stops before the optimizer: triple, weights, merged gradient."""
    engine, _ = lab.lora_engine(PLAIN, adapters_of(lab, "plain"), persistence=0)
    return operate(engine, lab.pi0_batches(0, 1), lab.pi0_batches(100, 1), mode, ALWAYS)


def lora_trajectory(
    lab: Lab, kind: str, accumulation: int = 1, dtype: str = "float32", recompute: bool = False
) -> Output:
    """Five steps of both kinds; adapters, moments and the frozen base at the end."""
    (engine, adapters), output = (
        lab.lora_engine(KINDS[kind], adapters_of(lab, kind), persistence=0, dtype=dtype, recompute=recompute),
        Output(),
    )
    trains, seen = _trains(engine), set()
    layer = engine.module.policy.model.paligemma_with_expert.paligemma.model.language_model.layers[0]
    projection = layer.self_attn.q_proj
    for part in (projection.base_layer, projection.lora_A["default"]):
        part.register_forward_pre_hook(lambda module, _: seen.add(str(module.weight.dtype)))
    _run(lab, engine, output, "RTRRT", accumulation)
    output.add("parameters", (part for part in masters(engine) if part[0] in trains))
    output.add("frozen", (part for part in masters(engine) if part[0] not in trains))
    output.add("moments", moments(engine))
    output.values |= {
        "trains": sorted(trains),
        "keys": sorted(adapters.keys),
        "frozen": _what_frozen_parameters_have(engine),
        "forward_dtypes": sorted(seen),
        "master_dtypes": sorted({str(shard.master.dtype) for shard in engine.shards(frozen=False)}),
        "frozen_dtypes": sorted(
            {
                _stored_dtype(parameter)
                for name, parameter in engine.module.policy.named_parameters()
                if name not in trains
            }
        ),
    }
    engine.close()
    return output


def lora_save_and_resume(lab: Lab) -> Output:
    """New adapters: three steps, a checkpoint, two more; and the same two again from the checkpoint."""
    output, directory = Output(), lab.scratch / f"lora_{lab.kind}_on{lab.world_size}"
    engine, adapters = lab.lora_engine(PLAIN)
    trains = _trains(engine)

    def trained(engine: Engine):
        return (part for part in masters(engine) if part[0] in trains)

    output.add("initial", trained(engine))
    _run(lab, engine, output, "TRT")
    save_checkpoint(
        directory,
        engine=engine,
        config=_train_config(lab),
        policy_dir=lab.policy_dir,
        scheduler_state=None,
        craft_state={"multiplier": 1.5},
        step=3,
        adapters=adapters,
    )
    output.values["keys"] = dict(adapters.keys)
    output.add("saved", trained(engine))
    output.add("saved", moments(engine))
    _run(lab, engine, output, "RT", first=3)
    output.add("unbroken", masters(engine))
    output.add("unbroken", moments(engine))
    engine.close()

    _resume(lab, directory, output)
    return output


def lora_load_from(lab: Lab, written_by: str) -> Output:
    """Resume from the adapters of another engine or number of ranks."""
    output = Output()
    _resume(lab, lab.scratch / f"lora_{written_by}", output)
    return output


def _resume(lab: Lab, directory, output: Output) -> None:
    engine, adapters = lab.lora_engine(PLAIN, directory)
    trains = _trains(engine)
    output.values["loaded"] = list(load_checkpoint(directory, engine, adapters))
    output.add("loaded", (part for part in masters(engine) if part[0] in trains))
    output.add("loaded", moments(engine))
    _run(lab, engine, output, "RT", first=3)
    output.add("resumed", masters(engine))
    output.add("resumed", moments(engine))
    engine.close()


def lora_costs(lab: Lab) -> Output:
    """Return the bytes that a retention step holds and sends, and the sizes of model and adapters."""
    (engine, _), output = lab.lora_engine(PLAIN, adapters_of(lab, "plain"), persistence=0), Output()
    task, anchors = lab.pi0_batches(0, 1), lab.pi0_batches(0, 1)
    plain = partial(task_step, engine, task, 1.0)
    retention = partial(
        retention_step,
        engine,
        task=task,
        anchors=anchors,
        constraint=None,
        multiplier=1.0,
        craft=craft_config(threshold=ALWAYS),
        max_norm=1.0,
        extra=[0.0],
    )
    for name, action in (("plain", plain), ("retention", retention)) * 2:
        with MemoryCounter() as counter:
            action()
        output.values[name] = counter.peak
    with CollectiveCounter() as collectives:
        accumulate(engine, task)
        engine.zero_grad()
    parameters = list(engine.module.parameters())
    sizes = {
        "model": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "adapters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
    }
    output.values |= {name: size * torch.float32.itemsize for name, size in sizes.items()}
    output.values["shard"] = sum(part.numel() * 4 for part in engine.gradient())
    reductions = {size: count for (name, size), count in collectives.seen.items() if "reduce" in name}
    output.values["reduced"] = sum(size * count for size, count in reductions.items())
    engine.close()
    return output
