"""`--engine.optimizer_state` from the command line: resumed exactly, changed on resume, and refused."""

import shutil

import pytest
import torch
from runs import assert_same_bits, losses, trained
from safetensors.torch import load_file

from craft_ds.engines.moment_formats import BLOCK, FORMATS
from craft_ds.export.export import export_checkpoint

pytestmark = pytest.mark.slow

FLAGS = ["--steps=6", "--save_freq=2", "--checkpoint.background=true", "--ema_decay=0.9"]


@pytest.fixture(scope="module", params=["bf16", "int8"])
def compact(request, inputs, tmp_path_factory):
    """Return the format, and a CRaFT run with it."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    run = tmp_path_factory.mktemp("compact") / "run"
    flags = [*inputs.flags(run), *inputs.craft_flags(), *FLAGS, f"--optimizer.state={request.param}"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments(flags))
    return request.param, run


def resumed(train, run, tmp_path, *flags):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    for name in ("final", "step_000004"):
        shutil.rmtree(copy / name)
    ended = train(None, f"--config_path={copy}/step_000002", "--resume=true", *flags)
    assert ended.status == 0, ended.errors
    return copy, ended


def moments(checkpoint):
    state = load_file(checkpoint / "optimizer.safetensors")
    return {name: values for name, values in state.items() if not name.endswith(".ema")}


def test_the_checkpoint_holds_what_the_format_can(compact):
    state, run = compact
    for name, values in moments(run / "final").items():
        form = FORMATS[state][name.rsplit(".", 1)[1]]
        rows = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        again = form.unpack(form.pack(rows, 0.5)).flatten()[: values.numel()]
        assert torch.equal(again, values.flatten()), name


def test_a_resumed_run_equals_an_uninterrupted_one(train, compact, tmp_path):
    state, run = compact
    again, ended = resumed(train, run, tmp_path)
    assert "changed since" not in ended.output
    assert f"(cpu, float32, moments in {state})" in ended.output
    assert_same_bits(again / "final", run / "final")


def test_the_format_may_change_on_resume(train, compact, tmp_path):
    state, run = compact
    again, ended = resumed(train, run, tmp_path, "--engine.optimizer_state=fp32")
    [line] = [line for line in ended.output.splitlines() if line.startswith("changed since")]
    assert f"--engine.optimizer_state=fp32 (was {state})" in line
    assert losses(again) == pytest.approx(losses(run), rel=1e-3)
    one, other = trained(again / "final"), trained(run / "final")
    assert any(not torch.equal(one[name], values) for name, values in other.items())


def test_an_export_is_that_of_the_weights(compact, tmp_path):
    _, run = compact
    export_checkpoint(run / "final", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, values in load_file(run / "final" / "model.safetensors").items():
        assert torch.equal(exported[name], values.reshape(exported[name].shape))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine.optimizer_state=int4"], "--engine.optimizer_state=int4"),
        (
            [
                "--optimizer.state=int8",
                "--use_policy_training_preset=false",
                "--optimizer.type=sgd",
                "--scheduler.type=diffuser",
                "--scheduler.num_warmup_steps=1",
            ],
            "--engine.optimizer_state=int8 is for Adam and AdamW, not for SGDConfig",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(train, tmp_path, flags, message):
    ended = train(tmp_path / "run", *flags)
    assert ended.status == 2
    assert message in ended.errors
    assert "Traceback" not in ended.errors
    assert not (tmp_path / "run").exists()
