"""Checks of FSDP2 alone, and recomputation under every sharded engine; each rank asserts for itself.

As a program: one rank. Arguments: the directory of results and the policy directory.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lab import Lab, masters
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from craft_ds.algorithm.flat_runs import flat_runs
from craft_ds.config.configs import FsdpConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.fsdp import FsdpEngine
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.wrapping import shard_units
from craft_ds.testing.collective_counter import CollectiveCounter
from craft_ds.testing.policies import read_from
from craft_ds.training.train_step import accumulate, measure, retention_step, task_step

TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.inner(x))


class TiedPolicy(nn.Module):
    """A policy without an adapter, with tied weights and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block(6) for _ in range(10))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        x = self.embed(batch["tokens"]) + self.shift
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).float(), batch["targets"]), None


class ScalarPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))


def _optimizer(policy: nn.Module) -> Callable[[], torch.optim.Optimizer]:
    return lambda: torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)


def _tokens(step: int, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(step)
    batch = {"tokens": torch.randint(11, (12,), generator=rng)}
    batch["targets"] = (batch["tokens"] * 3 + 1) % 11
    return {key: value[rank::world_size] for key, value in batch.items()}


def tied_weights_and_buffers(lab: Lab) -> None:
    torch.manual_seed(0)
    original = TiedPolicy()
    original.shift.copy_(torch.arange(6) / 6)
    read = read_from(original)
    with torch.device("meta"):
        policy = TiedPolicy()
    policy.shift = torch.zeros(6)
    assert policy.embed.weight.is_meta
    assert policy.head.weight is policy.embed.weight
    engine = FsdpEngine(PolicyWithLoss(policy), read, _optimizer(policy), FsdpConfig())
    assert policy.head.weight is policy.embed.weight
    assert isinstance(policy.layers[0], FSDPModule)
    assert policy.shift.equal(original.shift)

    single = SingleEngine(PolicyWithLoss(original), read, _optimizer(original), torch.device("cpu"))
    for step in range(4):
        found = task_step(engine, [_tokens(step, lab.rank, lab.world_size)], 1.0)
        expected = task_step(single, [_tokens(step)], 1.0)
        assert abs(found.loss - expected.loss) <= TOLERANCE * expected.loss
        assert abs(found.grad_norm - expected.grad_norm) <= TOLERANCE * expected.grad_norm
    assert policy.head.weight is policy.embed.weight
    full = dict(original.named_parameters())
    assert [shard.name for shard in engine.shards() if "head" in shard.name] == []
    for shard in engine.shards():
        stop = shard.start + shard.master.numel()
        expected_part = full[shard.name].detach().reshape(-1)[shard.start : stop]
        torch.testing.assert_close(shard.master, expected_part, rtol=TOLERANCE, atol=TOLERANCE)


def scalar_parameters_are_refused(lab: Lab) -> None:
    policy = ScalarPolicy()
    with pytest.raises(UserError, match="temperature is a scalar parameter"):
        FsdpEngine(PolicyWithLoss(policy), read_from(policy), _optimizer(policy), FsdpConfig())


def the_step_sends_nothing(lab: Lab) -> None:
    engine = lab.toy_engine()
    accumulate(engine, lab.toy_batches(0, 1))
    with CollectiveCounter() as counter:
        engine.gradient()
        engine.step()
    assert not counter.seen


def gradients_are_handed_over_without_a_copy(lab: Lab) -> None:
    engine = lab.toy_engine()
    accumulate(engine, lab.toy_batches(0, 1))
    before = {id(p): p.grad._local_tensor.data_ptr() for p in engine._trainable if p.grad is not None}
    kept = [part.clone() for part in engine.gradient()]
    taken = engine.take_gradient()
    for parameter, part in zip(engine._trainable, taken, strict=True):
        assert parameter.grad is None
        assert id(parameter) not in before or part.data_ptr() == before[id(parameter)]
    accumulate(engine, lab.toy_batches(0, 1, retention=True))
    assert all(torch.equal(a, b) for a, b in zip(taken, kept, strict=True))


def gradients_of_a_unit_are_one_run(lab: Lab) -> None:
    """As many kernels as units: what FSDP2 reduces together, surgery reads together."""
    engine = lab.pi0_engine()
    units = sum(isinstance(module, FSDPModule) for module in engine.module.modules())
    for batch in lab.pi0_batches(0, 2):
        engine.backward(engine.forward(batch).total, last=True)
    gradients = engine.gradient()
    runs = [run for (run,) in flat_runs(gradients)]
    assert sum(run.numel() for run in runs) == sum(part.numel() for part in gradients)
    # The root's parameters lie before and behind those of the other units.
    assert units <= len(runs) <= 2 * units < len(gradients)


def head_and_embedding_are_gathered_once(lab: Lab) -> None:
    """Like the root; the layers are gathered again for the backward pass."""
    engine = lab.pi0_engine()
    policy = engine.module.policy
    *layers, embedding, head = shard_units(policy)
    assert isinstance(embedding, nn.Embedding)
    assert head is policy.model.paligemma_with_expert.paligemma.lm_head

    def size(modules: list[nn.Module]) -> int:
        """Bytes of the shards that are sent and of the tensors that are received, all of whole rows."""
        padded = 0
        for parameter in (p for module in modules for p in module.parameters()):
            rows = -(-parameter.shape[0] // lab.world_size)
            padded += rows * (lab.world_size + 1) * parameter[0].numel()
        return 4 * padded

    def gathered(counter: CollectiveCounter) -> int:
        return sum(size * count for (name, size), count in counter.seen.items() if "allgather" in name)

    (batch,) = lab.pi0_batches(0, 1)
    with CollectiveCounter() as forward:
        loss = engine.forward(batch).total
    assert not isinstance(head.weight, DTensor)
    assert isinstance(embedding.weight, DTensor)
    with CollectiveCounter() as backward:
        engine.backward(loss, last=True)
    assert isinstance(head.weight, DTensor)
    assert gathered(forward) == size([policy])
    assert gathered(backward) == size(layers)


def nothing_stays_gathered(lab: Lab) -> None:
    """Nothing stays gathered after a pass, nor after an evaluation without a backward pass."""
    for kind in ("fsdp", "fsdp_kept"):
        engine = Lab(kind, lab.rank, lab.world_size, lab.policy_dir, lab.scratch).toy_engine()
        for action in (accumulate, measure):
            action(engine, lab.toy_batches(0, 1))
            assert all(isinstance(p, DTensor) for p in engine.module.parameters()), (kind, action)


def evaluation_sees_the_last_step(lab: Lab) -> None:
    """FSDP2 does not gather again what is gathered, which would then hold old values."""
    engine = Lab("fsdp_kept", lab.rank, lab.world_size, lab.policy_dir, lab.scratch).toy_engine(lr=0.1)
    before = measure(engine, lab.toy_batches(0, 1)).loss.item()
    accumulate(engine, lab.toy_batches(0, 1))
    assert measure(engine, lab.toy_batches(0, 1)).loss.item() == before
    engine.step()
    assert measure(engine, lab.toy_batches(0, 1)).loss.item() != before


def frozen_parameters_are_kept_as_they_are_gathered(lab: Lab) -> None:
    engine = lab.toy_engine(dtype="bfloat16")
    for name, parameter in engine.module.policy.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.startswith("frozen") else torch.float32), name


def a_wider_dtype_of_parameters_still_computes_in_bf16(lab: Lab) -> None:
    policy = lab.toy_engine().module.policy.__class__()
    read = read_from(policy)
    options = FsdpConfig(param_dtype="float32")
    engine = FsdpEngine(PolicyWithLoss(policy), read, _optimizer(policy), options, torch.bfloat16)
    seen = {}
    policy.inner.register_forward_hook(
        lambda module, _, output: seen.update(weight=module.weight.dtype, output=output.dtype)
    )
    task_step(engine, lab.toy_batches(0, 1), 0.0)
    assert seen == {"weight": torch.float32, "output": torch.bfloat16}


def _recomputed(lab: Lab, dtype: str) -> None:
    """Three retention steps on a tiny pi0_fast: recomputation changes no bit of them."""
    found = {}
    for recompute in (False, True):
        engine = lab.pi0_engine(recompute=recompute, dtype=dtype, persistence=0)
        layers = engine.module.policy.model.paligemma_with_expert.paligemma.model.language_model.layers
        calls: list[int] = []
        layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        craft = CraftConfig(enabled=True)
        values = []
        for step in range(3):
            task, anchors = lab.pi0_batches(step, 2), lab.pi0_batches(step + 100, 1)
            result = retention_step(
                engine, task=task, anchors=anchors, constraint=None, multiplier=1.0, craft=craft, max_norm=1.0
            )
            values += [result.loss, result.grad_norm, *result.triple]
        found[recompute] = values, {name: part.clone() for name, _, part in masters(engine)}, len(calls)
        engine.close()
    (values, parameters, calls_once), (again, parameters_again, calls_twice) = found[False], found[True]
    assert calls_twice == 2 * calls_once > 0
    assert again == values
    assert parameters_again.keys() == parameters.keys()
    assert all(parameters_again[name].equal(part) for name, part in parameters.items())


def _recompute(kind: str, dtype: str) -> Callable[[Lab], None]:
    return lambda lab: _recomputed(Lab(kind, lab.rank, lab.world_size, lab.policy_dir, lab.scratch), dtype)


CHECKS: dict[str, Callable[[Lab], None]] = {
    check.__name__: check
    for check in (
        tied_weights_and_buffers,
        scalar_parameters_are_refused,
        the_step_sends_nothing,
        gradients_are_handed_over_without_a_copy,
        gradients_of_a_unit_are_one_run,
        head_and_embedding_are_gathered_once,
        nothing_stays_gathered,
        evaluation_sees_the_last_step,
        frozen_parameters_are_kept_as_they_are_gathered,
        a_wider_dtype_of_parameters_still_computes_in_bf16,
    )
} | {
    f"recompute_{kind}_{dtype}": _recompute(kind, dtype)
    for kind in ("fsdp", "zero3")
    for dtype in ("float32", "bfloat16")
}


def main() -> None:
    from craft_ds.distributed.collectives import init_process_group
    from craft_ds.engines.deepspeed import init_distributed as init_deepspeed

    results, policy_dir = map(Path, sys.argv[1:3])
    init_deepspeed()
    init_process_group()  # the process group exists already
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, check in CHECKS.items():
        try:
            check(Lab("fsdp", rank, world_size, policy_dir, results))
            (results / f"{name}.{rank}.passed").touch()
        except Exception:
            (results / f"{name}.{rank}.error").write_text(traceback.format_exc())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
