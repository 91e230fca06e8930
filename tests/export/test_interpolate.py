"""Interpolation of a checkpoint with its teacher, against the formula, and what cannot be interpolated."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from craft_ds.errors import UserError
from craft_ds.export.export import export_checkpoint
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.testing.policies import make_test_policy_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["consolidated", "per_rank"])
def final(request, inputs, tmp_path_factory):
    """The final checkpoint of a run of three large steps."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    output = tmp_path_factory.mktemp("runs") / "run"
    flags = [
        *inputs.flags(output),
        "--steps=3",
        "--policy.optimizer_lr=0.01",
        "--policy.scheduler_warmup_steps=0",
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        return train_craft(parse_arguments([*flags, f"--checkpoint.layout={request.param}"]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weights_are_interpolated(final, inputs, tmp_path, alpha):
    export_checkpoint(final, tmp_path / "tuned")
    said = export_checkpoint(final, tmp_path / "mixed", merge_with=str(inputs.policy), alpha=alpha)
    assert f"{alpha:g} of those of {inputs.policy}" in said
    paths = (inputs.policy, tmp_path / "tuned", tmp_path / "mixed")
    teacher, tuned, mixed = (load_file(path / "model.safetensors") for path in paths)
    assert mixed.keys() == tuned.keys()
    moved = 0.0
    for name, values in mixed.items():
        expected = (1 - alpha) * tuned[name].double() + alpha * teacher[name].double()
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-7)
        moved += (tuned[name] - teacher[name]).abs().sum().item()
    assert moved > 1
    load_policy(load_policy_config(tmp_path / "mixed"), tmp_path / "mixed")
    configs = [(path / "config.json").read_text().replace(path.name, "") for path in paths[1:]]
    assert configs[0] == configs[1]


def refused(checkpoint, tmp_path, **options) -> str:
    with pytest.raises(UserError) as caught:
        export_checkpoint(checkpoint, tmp_path / "mixed", **options)
    assert not (tmp_path / "mixed").exists()
    return str(caught.value)


def test_another_architecture_is_refused(final, tmp_path):
    wider = make_test_policy_dir(tmp_path / "other", cameras=1)
    weights = load_file(wider / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    save_file({**weights, name: weights[name][:-1].clone()}, wider / "model.safetensors")
    assert name in refused(final, tmp_path, merge_with=str(wider))


def test_other_statistics_are_refused(final, inputs, tmp_path):
    other = shutil.copytree(inputs.policy, tmp_path / "other")
    [file] = other.glob("policy_preprocessor*.safetensors")
    values = load_file(file)
    save_file({name: value + 0.5 for name, value in values.items()}, file)
    line = refused(final, tmp_path, merge_with=str(other))
    assert "--merge_with" in line
    assert "min of action[0] is -0.5 there and -1 here" in line


def test_adapters_are_refused(final, adapted, inputs, tmp_path):
    checkpoint = adapted("attention")
    assert "--merge_lora" in refused(checkpoint, tmp_path, merge_with=str(inputs.policy))
    assert "--merge_lora" in refused(final, tmp_path, merge_with=str(checkpoint))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(final, inputs, tmp_path, alpha):
    assert "--alpha" in refused(final, tmp_path, merge_with=str(inputs.policy), alpha=alpha)


@pytest.mark.parametrize("alpha", ["0.3", "0.5"])
def test_a_share_without_a_policy_is_refused(final, tmp_path, alpha):
    from craft_ds.commands.export import main

    with pytest.raises(UserError, match=rf"--alpha={alpha} applies only with --merge_with"):
        main([str(final), f"--output={tmp_path / 'out'}", f"--alpha={alpha}"])


def test_merging_adapters_and_interpolating_at_once_is_refused(adapted, inputs, tmp_path):
    line = refused(adapted("attention"), tmp_path, merge_lora=True, merge_with=str(inputs.policy))
    assert "--merge_with does not apply with --merge_lora" in line


def test_half_is_the_default(final, inputs, tmp_path):
    assert "0.5 of those of" in export_checkpoint(final, tmp_path / "mixed", merge_with=str(inputs.policy))
