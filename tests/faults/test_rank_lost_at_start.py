"""A rank that dies before the first step: the others name it, even if torch does not report it."""

import pytest
from crash_lab import ENGINES
from launch import FaultInjector

from craft_ds.errors import LOST_RANK_STATUS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_during_model_build_is_named(inputs, fork_server, tmp_path, engine, victim):
    run, often = tmp_path / "run", FaultInjector("fault_injectors:shorten_heartbeat_interval", {})
    dies = FaultInjector("fault_injectors:kill_during_model_build", {})
    ended = fork_server.run(
        [*inputs.flags(run), *inputs.craft_flags(), *ENGINES[engine]],
        2,
        injectors={victim: [often, dies], 1 - victim: [often]},
        grace=30.0,
    )
    survivor = 1 - victim
    assert (ended.statuses[victim], ended.statuses[survivor]) == (-9, LOST_RANK_STATUS), ended.outputs
    assert f"error: rank {victim} has stopped or its machine is gone" in ended.outputs[survivor]
    assert not run.exists()
