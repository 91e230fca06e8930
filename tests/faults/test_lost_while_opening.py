"""A rank that dies before the first step: the others say who it was, also where torch tells them nothing."""

import pytest
from crashes import ENGINES
from ranks import Saboteur

from craft_ds.errors import LOST_RANK_STATUS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_the_model_is_built_is_named(inputs, fork_server, tmp_path, engine, victim):
    run, often = tmp_path / "run", Saboteur("saboteurs:show_heartbeats_often", {})
    dies = Saboteur("saboteurs:die_while_the_model_is_built", {})
    ended = fork_server.run(
        [*inputs.flags(run), *inputs.craft_flags(), *ENGINES[engine]],
        2,
        saboteurs={victim: [often, dies], 1 - victim: [often]},
        grace=30.0,
    )
    survivor = 1 - victim
    assert (ended.statuses[victim], ended.statuses[survivor]) == (-9, LOST_RANK_STATUS), ended.outputs
    assert f"error: rank {victim} has stopped or its machine is gone" in ended.outputs[survivor]
    assert not run.exists()
