"""`--engine.compile=true` from the command line."""

import pytest
from runs import losses, trained

from craft_ds.config.parser import parse_arguments
from craft_ds.engines.compiled_layers import check_compile
from craft_ds.errors import UserError


@pytest.mark.slow
@pytest.mark.sample(0)
def test_a_compiled_run_is_the_eager_one(train, inputs, saving, tmp_path, unbroken):
    config = parse_arguments(inputs.flags(tmp_path / "unused"))
    config.validate()
    try:
        check_compile(config.policy)
    except UserError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    ended = train(run, *saving, "--engine.compile=true")
    assert ended.status == 0, ended.errors
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-4)
    assert trained(run / "final").keys() == trained(unbroken / "final").keys()


def test_a_machine_without_a_compiler_is_refused(refuses, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refuses(tmp_path / "run", "--engine.compile=true")
    assert "--engine.compile=true needs a C++ compiler, but there is no no-such-compiler" in message


def test_zero3_is_refused(refuses, tmp_path):
    message = refuses(tmp_path / "run", "--engine.compile=true", "--ds_config=zero3")
    assert "--engine.compile=true does not work with ZeRO-3" in message
