"""`--ema_decay` from the command line: the average, resuming it, and exporting it."""

import shutil

import pytest
import torch
from runs import assert_same_bits
from safetensors.torch import load_file

from craft_ds.errors import UserError
from craft_ds.export.export import export_checkpoint
from craft_ds.testing.checkpoints import renew_manifest

pytestmark = pytest.mark.slow

FLAGS = ["--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0", "--save_freq=1", "--steps=3"]
DECAY = 0.75


@pytest.fixture(scope="module")
def averaged(inputs, tmp_path_factory):
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    run = tmp_path_factory.mktemp("averaged") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(run), *FLAGS, f"--ema_decay={DECAY}"]))
    return run


def weights(directory):
    return load_file(directory / "model.safetensors")


def averages(checkpoint):
    state = load_file(checkpoint / "optimizer.safetensors")
    return {name.removesuffix(".ema"): part for name, part in state.items() if name.endswith(".ema")}


def test_by_definition(averaged, inputs):
    expected = {name: values.float() for name, values in weights(inputs.policy).items()}
    for name in ("step_000001", "step_000002", "final"):
        now = weights(averaged / name)
        expected = {key: DECAY * values + (1 - DECAY) * now[key] for key, values in expected.items()}
        found = averages(averaged / name)
        assert found.keys() <= expected.keys()
        assert len(found) > 10
        for key, values in found.items():
            torch.testing.assert_close(values, expected[key].reshape(values.shape), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(values, now[key]) for key, values in found.items())


@pytest.mark.parametrize("layout", ["consolidated", "per_rank"])
def test_a_resumed_run_continues_the_average(train, averaged, tmp_path, layout):
    run = tmp_path / "run"
    if layout == "consolidated":
        shutil.copytree(averaged, run, symlinks=True)
    else:
        assert train(run, *FLAGS, f"--ema_decay={DECAY}", "--checkpoint.layout=per_rank").status == 0
    for name in ("final", "step_000002"):
        shutil.rmtree(run / name)
    ended = train(None, f"--config_path={run}/step_000001", "--resume=true")
    assert ended.status == 0, ended.errors
    if layout == "consolidated":
        assert_same_bits(run / "final", averaged / "final")
    assert "moving average" in export_checkpoint(run / "final", tmp_path / "exported", ema=True)
    exported, expected = weights(tmp_path / "exported"), averages(averaged / "final")
    assert exported.keys() == weights(averaged / "final").keys()
    for key, values in expected.items():
        assert torch.equal(exported[key], values), key


def test_the_average_of_adapters(train, tmp_path):
    run = tmp_path / "run"
    ended = train(run, *FLAGS, "--lora=preset", "--lora.rank=2", f"--ema_decay={DECAY}")
    assert ended.status == 0, ended.errors
    assert "moving average" in export_checkpoint(run / "final", tmp_path / "exported", ema=True)
    with pytest.raises(UserError, match="--merge_lora does not apply with --ema"):
        export_checkpoint(run / "final", tmp_path / "merged", ema=True, merge_lora=True)
    exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    expected = averages(run / "final")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(values, expected[key]) for key, values in exported.items())
    now = load_file(run / "final" / "adapter_model.safetensors")
    assert any(not torch.equal(values, now[key]) for key, values in exported.items())


def test_a_run_that_gets_one_later_starts_at_its_weights(train, averaged, tmp_path):
    run = tmp_path / "run"
    ended = train(run, *FLAGS)
    assert ended.status == 0, ended.errors
    with pytest.raises(UserError, match=r"--ema: .*final is of a run without --ema_decay"):
        export_checkpoint(run / "final", tmp_path / "exported", ema=True)
    for name in ("final", "step_000002"):
        shutil.rmtree(run / name)
    ended = train(None, f"--config_path={run}/step_000001", "--resume=true", "--ema_decay=0.5")
    assert ended.status == 0, ended.errors
    one, two = weights(run / "step_000001"), weights(run / "step_000002")
    for key, values in averages(run / "step_000002").items():
        torch.testing.assert_close(values, (0.5 * (one[key] + two[key])).reshape(values.shape))
    # A run with an average, resumed without one.
    ended = train(
        None,
        f"--config_path={averaged}/step_000001",
        f"--output_dir={tmp_path}/on",
        "--resume=true",
        "--ema_decay=0",
    )
    assert ended.status == 0, ended.errors
    assert not averages(tmp_path / "on" / "final")


@pytest.mark.parametrize("damage", ["shape", "nan", "missing"])
def test_a_damaged_average_is_refused(train, averaged, tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    run = tmp_path / "run"
    shutil.copytree(averaged / "step_000001", run / "step_000001")
    path = run / "step_000001" / "optimizer.safetensors"
    state = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = next(name for name in state if name.endswith(".ema"))
    values = state.pop(name)
    if damage != "missing":
        state[name] = values.reshape(-1, 1) if damage == "shape" else torch.full_like(values, torch.nan)
    save_file(state, path, metadata)
    renew_manifest(run / "step_000001")
    ended = train(None, f"--config_path={run}/step_000001", "--resume=true", f"--output_dir={tmp_path}/on")
    assert ended.status == 2
    assert "Traceback" not in ended.errors
    assert "does not hold a moving average of this policy" in ended.errors


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_a_decay_outside_its_range(train, tmp_path, value):
    ended = train(tmp_path / "run", f"--ema_decay={value}")
    assert ended.status == 2
    assert "must lie in [0, 1)" in ended.errors
