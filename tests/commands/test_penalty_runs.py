"""`--penalty.*` from the command line: runs, resumed runs, and combinations without effect."""

import math
import shutil

import pytest
import torch
from runs import assert_same_bits, assert_same_bits_of_adapters, metrics, untimed

from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.errors import UserError

pytestmark = pytest.mark.slow

FAST = ["--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0", "--save_freq=2"]


def penalty_flags(inputs, name):
    if name == "l2":
        return ["--craft.preset=l2", "--penalty.weight=5"]
    anchors = f"--craft.anchor_cache_dir={inputs.anchors}"
    return ["--penalty.name=ewc", "--penalty.weight=5", "--penalty.fisher_samples=3", anchors]


@pytest.mark.parametrize(
    ("name", "more"), [("l2", []), ("ewc", []), ("ewc", ["craft"])], ids=["l2", "ewc", "ewc-craft"]
)
def test_a_run_resumes_with_the_same_penalty(train, inputs, tmp_path, name, more):
    craft = inputs.craft_flags() if more else []
    flags = [*FAST, *craft, *penalty_flags(inputs, name)]
    ended = train(tmp_path / "run", *flags)
    assert ended.status == 0, ended.errors
    assert f"✓ penalty: {name}, weight 5" in ended.output
    assert ("preset l2: --craft.enabled=false" in ended.output) == (name == "l2")
    losses = [row["penalty/loss"] for row in metrics(tmp_path / "run") if "penalty/loss" in row]
    assert losses[0] == 0.0
    assert all(0.0 < loss < math.inf for loss in losses[1:])

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", resumed, symlinks=True)
    shutil.rmtree(resumed / "final")
    ended = train(None, f"--config_path={resumed}/step_000002", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(resumed / "final", tmp_path / "run" / "final")
    assert untimed(resumed) == untimed(tmp_path / "run")


def test_adapters_are_drawn_back_to_their_start(train, inputs, tmp_path):
    flags = ["--lora=attention", *FAST, *penalty_flags(inputs, "l2")]
    assert train(tmp_path / "run", *flags).status == 0
    first = tmp_path / "run" / "step_000002"
    # New adapters: θ_0 is drawn again from the seed that the run started with, not from the present one.
    ended = train(None, f"--config_path={first}", f"--output_dir={tmp_path / 'again'}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits_of_adapters(tmp_path / "again" / "final", tmp_path / "run" / "final")
    start = torch.load(first / "craft_state.pt", weights_only=True)["start"]
    assert start["path"] == ""

    # Stored adapters: θ_0 is what the second run started from.
    flags = [f"--policy.path={first}", *flags]
    assert train(tmp_path / "second", *flags).status == 0
    rows = metrics(tmp_path / "second")
    assert rows[0]["penalty/loss"] == 0.0
    second = tmp_path / "second" / "step_000002"
    ended = train(None, f"--config_path={second}", f"--output_dir={tmp_path / 'third'}", "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits_of_adapters(tmp_path / "third" / "final", tmp_path / "second" / "final")


def test_a_start_that_is_gone_or_changed_is_named(train, inputs, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(inputs.policy, policy)
    flags = [*FAST, f"--policy.path={policy}", *penalty_flags(inputs, "l2")]
    assert train(tmp_path / "run", *flags).status == 0
    shutil.rmtree(tmp_path / "run" / "final")
    resume = [f"--config_path={tmp_path}/run/step_000002", "--resume=true"]

    file = policy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ended = train(None, *resume)
    assert ended.status == 2
    assert f"the weights of {policy} have changed" in ended.errors
    shutil.rmtree(policy)
    ended = train(None, *resume)
    assert ended.status == 2
    assert f"--penalty.name=l2 needs the policy that the run started from: policy path '{policy}'" in (
        ended.errors
    )
    # Without the penalty the run can continue.
    assert train(None, *resume, "--penalty.name=none", "--penalty.weight=0").status == 0


def test_a_penalty_cannot_begin_in_a_resumed_run(train, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    shutil.rmtree(run / "final")
    flags = ["--penalty.name=l2", "--penalty.weight=1"]
    ended = train(None, f"--config_path={run}/last", "--resume=true", *flags)
    assert ended.status == 2
    assert "started without a penalty" in ended.errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 1.0}, "--penalty.weight=1.0 has no effect with --penalty.name=none"),
        ({"fisher_samples": 3}, "--penalty.fisher_samples=3 has no effect with --penalty.name=none"),
        ({"name": "l2"}, "--penalty.weight=0.0 with --penalty.name=l2 must be a number above 0"),
        ({"name": "l2", "weight": math.inf}, "--penalty.weight=inf"),
        ({"name": "l2", "weight": 1.0, "fisher_samples": 3}, "no effect with --penalty.name=l2"),
        ({"name": "ewc", "weight": 1.0, "fisher_samples": 0}, "must be at least 1"),
        ({"name": "ewc", "weight": 1.0}, "set --craft.anchor_cache_dir"),
        ({"name": "l3"}, "--penalty.name=l3: choose one of none, l2, ewc"),
    ],
)
def test_options_without_effect_are_refused(fields, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        PenaltyConfig(**fields).validate(CraftConfig())


def test_a_penalty_is_not_part_of_single_layers():
    with pytest.raises(UserError, match=r"--craft\.surgery_scope=layer does not include"):
        PenaltyConfig(name="l2", weight=1.0).validate(CraftConfig(surgery_scope="layer"))


def test_other_craft_flags_still_need_craft(refuses, inputs, tmp_path):
    flags = [*penalty_flags(inputs, "ewc"), "--craft.retention_freq=2"]
    line = refuses(tmp_path / "run", *flags)
    assert "--craft.retention_freq has no effect without --craft.enabled=true" in line
