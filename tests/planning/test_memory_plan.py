"""Plans add up, scale as sharding does, and meet a measured step."""

import pytest
import torch
from planning_small import WORKLOAD, full_batch, read, small_config

from craft_ds.config import CraftConfig
from craft_ds.engines.single import SingleEngine
from craft_ds.memory_counter import MemoryCounter
from craft_ds.planning import ENGINES
from craft_ds.planning.plan import plan_memory
from craft_ds.planning.rhythm import Setting
from craft_ds.planning.shapes import Lora, Workload, skeleton_without_tokenizers
from craft_ds.planning.simulate import simulate_pass
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.steps import retention_step

BUCKET = 10_000


@pytest.fixture(scope="module")
def trace():
    return simulate_pass(small_config(), WORKLOAD)


def setting(engine, ranks, **options):
    return Setting(engine, ranks, reduce_bucket=BUCKET, persistence=0, **options)


def test_the_plan_of_one_process_is_what_a_retention_step_takes(trace):
    config = small_config()
    policy = skeleton_without_tokenizers(config)
    task, anchors = full_batch(config, 1), full_batch(config, 2)
    with MemoryCounter() as counter:
        engine = SingleEngine(
            PolicyWithLoss(policy),
            read,
            lambda: torch.optim.AdamW(policy.parameters(), lr=1e-4),
            torch.device("cpu"),
        )
        for _ in range(2):
            counter.peak = 0
            retention_step(engine, [task], [anchors], None, 1.0, CraftConfig(enabled=True), 1.0)
    planned = plan_memory(trace, WORKLOAD, setting("single", 1, foreach_optimizer=False))
    assert planned.total == pytest.approx(counter.peak, rel=0.02)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_more_ranks_take_less_each(trace, engine):
    totals = [
        (plan.total, plan.host)
        for plan in (plan_memory(trace, WORKLOAD, setting(engine, ranks)) for ranks in (2, 4, 8))
    ]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_and_checkpointing_take_less(trace, engine):
    full = plan_memory(trace, WORKLOAD, setting(engine, 2)).total
    lora = simulate_pass(small_config(), WORKLOAD, lora=Lora(2))
    assert plan_memory(lora, WORKLOAD, setting(engine, 2)).total < full
    checkpointed = simulate_pass(small_config(), WORKLOAD, checkpointing=True)
    assert plan_memory(checkpointed, WORKLOAD, setting(engine, 2)).total < full


def test_optimizer_state_is_sharded(trace):
    shard = -(-trace.trainable // 4)
    assert plan_memory(trace, WORKLOAD, setting("fsdp", 4)).optimizer == 8 * shard
    for engine in ("zero2", "zero3"):  # and fp32 masters
        assert plan_memory(trace, WORKLOAD, setting(engine, 4)).optimizer == 12 * shard
    assert plan_memory(trace, WORKLOAD, setting("fsdp_offload", 4)).optimizer == 0


def test_second_gradient_costs_a_shard_and_nothing_where_the_host_has_room(trace):
    shard = -(-trace.trainable // 4)
    assert plan_memory(trace, WORKLOAD, setting("fsdp", 4)).second_gradient == 4 * shard
    assert plan_memory(trace, WORKLOAD, setting("zero3", 4)).second_gradient == 4 * shard
    assert plan_memory(trace, WORKLOAD, setting("zero3_offload", 4)).second_gradient == 0


def test_logits_are_named_where_they_are_the_peak():
    workload = Workload(batch_size=4, prompt_length=1, action_length=2000)
    config = small_config()
    trace = simulate_pass(config, workload, checkpointing=True)
    plan = plan_memory(trace, workload, setting("single", 1))
    assert plan.logits == workload.supervised * config.vocab_size * 8


def test_offload_moves_everything_that_is_kept_to_the_host(trace):
    plan = plan_memory(trace, WORKLOAD, setting("fsdp_offload", 4))
    assert (plan.parameters, plan.optimizer, plan.gradient, plan.second_gradient) == (0, 0, 0, 0)
    # Parameters, both moments, g_t and the gradient.
    assert plan.host == 20 * -(-trace.trainable // 4)
