"""`--engine.compile=true` from the command line."""

import pytest
from runs import losses, trained


@pytest.mark.slow
@pytest.mark.sample(0)
def test_a_compiled_run_is_the_eager_one(inductor, train, saving, tmp_path, unbroken):
    run = tmp_path / "run"
    ended = train(run, *saving, "--engine.compile=true")
    assert ended.status == 0, ended.errors
    assert "(cpu, float32, compiled layers)" in ended.output
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-4)
    assert trained(run / "final").keys() == trained(unbroken / "final").keys()


def test_a_machine_without_a_compiler_is_refused(refuses, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refuses(tmp_path / "run", "--engine.compile=true")
    assert "--engine.compile=true needs a C++ compiler, and no-such-compiler is not installed" in message


def test_zero3_is_refused(refuses, tmp_path):
    message = refuses(tmp_path / "run", "--engine.compile=true", "--ds_config=zero3")
    assert "--engine.compile=true does not work with ZeRO-3" in message
