"""Exported checkpoints load and act in stock LeRobot."""

import json
import shutil

import peft
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import MetaworldEnv
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from craft_ds.cli import run_command
from craft_ds.errors import UserError
from craft_ds.export import lora_merge, verify_merge
from craft_ds.export.export import export_checkpoint
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastPolicy
from craft_ds.testing.checkpoints import renew_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def final(inputs, tmp_path_factory):
    """The final checkpoint of a run of two steps."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        output = tmp_path_factory.mktemp("runs") / "run"
        return train_craft(parse_arguments([*inputs.flags(output), "--steps=2"]))


@pytest.fixture(scope="module")
def exported(final, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "policy"
    export_checkpoint(final, directory)
    return directory


def behaviour(policy, processors, camera: str) -> tuple[torch.Tensor, float]:
    """Return the action for a fixed observation, as in a rollout, and the loss of a fixed action chunk."""
    rng = torch.Generator().manual_seed(0)
    observation = {
        camera: torch.rand(1, 3, 64, 64, generator=rng),
        "observation.state": torch.rand(1, 4, generator=rng) - 0.5,
        "task": ["press the red button"],
    }
    policy.eval()
    policy.reset()
    policy.config.validate_action_token_prefix = False  # it does not start with "Action:" yet
    preprocessor, postprocessor = processors
    action = postprocessor(policy.select_action(preprocessor(dict(observation))))
    chunk = torch.rand(1, 8, 4, generator=rng) - 0.5
    with torch.no_grad():
        loss, _ = policy.forward(preprocessor({**observation, "action": chunk}))
    return action, float(loss)


def test_an_export_has_the_policy_and_no_training_state(exported, final):
    names = {path.name for path in exported.iterdir()}
    assert names >= {"config.json", "model.safetensors", "policy_preprocessor.json", "text_tokenizer"}
    training = {
        "optimizer.safetensors",
        "scheduler.pt",
        "craft_state.pt",
        "train_config.json",
        "manifest.json",
    }
    assert not names & training
    assert training <= {path.name for path in final.iterdir()}


def test_an_export_has_the_trained_weights(exported, final, inputs):
    trained, written = load_file(final / "model.safetensors"), load_file(exported / "model.safetensors")
    initial = load_file(inputs.policy / "model.safetensors")
    assert trained.keys() == written.keys() == initial.keys()
    assert all(torch.equal(trained[name], written[name]) for name in trained)
    assert any(not torch.equal(trained[name], initial[name].float()) for name in trained)


@pytest.mark.parametrize("kind", ["exported", "checkpoint"])
def test_stock_from_pretrained_loads_every_weight(exported, final, kind):
    directory = exported if kind == "exported" else final
    policy = TinyPI0FastPolicy.from_pretrained(directory, strict=True)
    stored = load_file(directory / "model.safetensors")
    state = policy.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name


def test_a_policy_built_like_lerobot_eval_acts_the_same(exported, final, inputs):
    """Built like in `lerobot_eval.eval_main` from `--policy.path` for `--env.type=metaworld`."""
    config = PreTrainedConfig.from_pretrained(exported)
    config.pretrained_path, config.device = exported, "cpu"
    names = {"observation.image": "observation.images.top"}
    policy = make_policy(cfg=config, env_cfg=MetaworldEnv(), rename_map=names)
    processors = make_pre_post_processors(
        policy_cfg=config,
        pretrained_path=config.pretrained_path,
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": names},
        },
    )
    action, loss = behaviour(policy, processors, "observation.image")
    assert action.shape == (1, 4)

    for directory, same in ((final, True), (inputs.policy, False)):
        config = load_policy_config(directory)
        ours = load_policy(config, directory), load_processors(config, directory)
        expected_action, expected_loss = behaviour(*ours, "observation.images.top")
        assert (expected_loss == loss) is same
        assert torch.equal(expected_action, action) or not same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_only_rounds_the_weights(final, tmp_path, dtype):
    output = tmp_path / "policy"
    export_checkpoint(final, output, dtype)
    exact, rounded = load_file(final / "model.safetensors"), load_file(output / "model.safetensors")
    for name, tensor in exact.items():
        assert rounded[name].dtype == (getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype)), name
    TinyPI0FastPolicy.from_pretrained(output, strict=True)


def test_an_export_can_be_fine_tuned_again(exported):
    """It loads strictly, with its own tokenizers."""
    config = load_policy_config(exported)
    load_policy(config, exported)
    load_processors(config, exported)


def test_an_existing_output_is_not_changed(final, tmp_path):
    output = tmp_path / "policy"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"--output={output} exists already"):
        export_checkpoint(final, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_damaged_checkpoint_is_not_exported(final, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(final, damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        export_checkpoint(damaged, tmp_path / "policy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("kind", ["policy", "nothing"])
def test_a_path_that_is_not_a_checkpoint_is_named(inputs, tmp_path, kind):
    path = inputs.policy if kind == "policy" else tmp_path / "none"
    with pytest.raises(UserError, match=f"{path} is not a craft-ds checkpoint"):
        export_checkpoint(path, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_no_policy(final, tmp_path, monkeypatch):
    from craft_ds.export import export

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "policy"
    with monkeypatch.context() as patched:
        patched.setattr(export, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(final, output)
    assert not output.exists()
    export_checkpoint(final, output)
    assert (output / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def built_by_lerobot(directory):
    """Build policy and processors like LeRobot from `--policy.path`."""
    config = PreTrainedConfig.from_pretrained(directory)
    config.pretrained_path, config.device = directory, "cpu"
    policy = make_policy(cfg=config, env_cfg=MetaworldEnv(), rename_map={"observation.image": CAMERA})
    overrides = {"device_processor": {"device": "cpu"}}
    processors = make_pre_post_processors(
        policy_cfg=config, pretrained_path=str(directory), preprocessor_overrides=overrides
    )
    return policy, processors


CAMERA = "observation.images.top"
TRAINING_STATE = {
    "optimizer.safetensors",
    "scheduler.pt",
    "craft_state.pt",
    "train_config.json",
    "manifest.json",
}


@pytest.mark.parametrize("kind", ["attention_mlp_vision", "dora", "modules_to_save"])
def test_a_merged_policy_acts_like_its_adapters_in_stock_lerobot(adapted, inputs, tmp_path, kind):
    output = tmp_path / "policy"
    summary = export_checkpoint(adapted(kind), output, merge_lora=True)
    assert "32 frames of craft-ds/test" in summary
    assert " 0 of " in summary
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "policy_preprocessor.json", "text_tokenizer"}
    assert not {name for name in names if name.startswith("adapter")} | (names & TRAINING_STATE)
    assert json.loads((output / "config.json").read_text())["use_peft"] is False
    base = load_file(inputs.policy / "model.safetensors")
    written = load_file(output / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }

    policy, processors = built_by_lerobot(output)
    assert type(policy) is TinyPI0FastPolicy
    action, loss = behaviour(policy, processors, CAMERA)
    config = load_policy_config(adapted(kind))
    adapters = load_trained_policy(config, adapted(kind)), load_processors(config, adapted(kind))
    expected_action, expected_loss = behaviour(*adapters, CAMERA)
    _, base_loss = behaviour(
        load_policy(load_policy_config(inputs.policy), inputs.policy), adapters[1], CAMERA
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert abs(base_loss - expected_loss) > 1e-3
    torch.testing.assert_close(action, expected_action)


def test_a_merged_policy_decodes_the_tokens_of_its_preprocessor(adapted, tmp_path):
    """The preprocessor encodes an action chunk; policy and postprocessor decode it."""
    output = tmp_path / "policy"
    export_checkpoint(adapted("attention_mlp"), output, merge_lora=True)
    policy, (preprocessor, postprocessor) = built_by_lerobot(output)
    rng = torch.Generator().manual_seed(0)
    chunk = 0.3 * torch.rand(2, 8, 4, generator=rng).cumsum(dim=1) - 0.5
    batch = preprocessor(
        {
            CAMERA: torch.rand(2, 3, 64, 64, generator=rng),
            "observation.state": torch.rand(2, 4, generator=rng) - 0.5,
            "task": ["press the red button"] * 2,
            "action": chunk,
        }
    )
    # Generated tokens start after the token that starts an action.
    generated = batch["action.tokens"][:, 1:] * batch["action.token_mask"][:, 1:]
    decoded = postprocessor(policy.detokenize_actions(generated, 8, 4))
    assert decoded.shape == chunk.shape
    assert (decoded - chunk).abs().max() < 0.3
    assert (decoded - chunk.roll(1, dims=0)).abs().max() > 0.3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_in_another_dtype_is_the_rounded_fp32_merge(adapted, tmp_path, dtype):
    for each in ("float32", dtype):
        export_checkpoint(adapted("dora"), tmp_path / each, each, merge_lora=True, max_token_difference=1.0)
    exact, rounded = (load_file(tmp_path / each / "model.safetensors") for each in ("float32", dtype))
    for name, tensor in exact.items():
        assert rounded[name].dtype == (getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype)), name
    TinyPI0FastPolicy.from_pretrained(tmp_path / dtype, strict=True)


def test_a_merge_with_a_wrong_tensor_is_refused_and_removed(adapted, tmp_path, monkeypatch):
    read = lora_merge.MergedWeights.read

    def wrong(self, name, start, stop):
        values = read(self, name, start, stop)
        return -values if name.endswith("layers.1.self_attn.v_proj.weight") else values

    with monkeypatch.context() as patched:
        patched.setattr(lora_merge.MergedWeights, "read", wrong)
        with pytest.raises(UserError, match="the merged policy in float32 differs from the trained one"):
            export_checkpoint(adapted("attention_mlp"), tmp_path / "policy", merge_lora=True)
    assert list(tmp_path.iterdir()) == []
    export_checkpoint(adapted("attention_mlp"), tmp_path / "policy", merge_lora=True)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_the_token_bound_is_that_of_the_flag(adapted, tmp_path, monkeypatch):
    rounded = verify_merge.Comparison(
        0.01, 10.0, tokens=100, different_tokens=20, samples=32, different_samples=4
    )
    monkeypatch.setattr(verify_merge, "compare", lambda *_: rounded)
    export = {"dtype": "bfloat16", "merge_lora": True}
    with pytest.raises(
        UserError, match=r"20 of 100 .*difference is 0.1: export with --dtype float32, or raise"
    ):
        export_checkpoint(adapted("attention"), tmp_path / "policy", **export)
    assert list(tmp_path.iterdir()) == []
    summary = export_checkpoint(adapted("attention"), tmp_path / "policy", **export, max_token_difference=0.2)
    assert "20 of 100 action tokens differ (20.00%)" in summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_adapters_load_in_stock_lerobot_on_their_base(adapted, inputs, tmp_path, dtype):
    checkpoint, output = adapted("modules_to_save"), tmp_path / "policy"
    summary = export_checkpoint(checkpoint, output, dtype)
    assert f"only the LoRA adapters, which PEFT and LeRobot load on {inputs.policy}" in summary
    assert not (output / "model.safetensors").exists()
    assert not {path.name for path in output.iterdir()} & TRAINING_STATE
    exact, written = (load_file(path / "adapter_model.safetensors") for path in (checkpoint, output))
    assert exact.keys() == written.keys()
    for name, tensor in exact.items():
        assert torch.equal(written[name], tensor.to(getattr(torch, dtype))), name
    with (
        safe_open(output / "adapter_model.safetensors", "pt") as file,
        safe_open(checkpoint / "adapter_model.safetensors", "pt") as original,
    ):
        assert file.metadata() == original.metadata()
        assert len(file.metadata()["base_weights_sha256"]) == 64

    policy, processors = built_by_lerobot(output)
    assert isinstance(policy, peft.PeftModel)
    _, loss = behaviour(policy, processors, CAMERA)
    config = load_policy_config(checkpoint)
    policy = load_trained_policy(config, checkpoint)
    _, expected = behaviour(policy, load_processors(config, checkpoint), CAMERA)
    assert loss == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("merge_lora", [True, False])
def test_a_moved_base_is_given_by_its_flag(adapted, inputs, tmp_path, merge_lora):
    checkpoint, moved = tmp_path / "checkpoint", tmp_path / "moved"
    shutil.copytree(adapted("attention"), checkpoint)
    config = checkpoint / "adapter_config.json"
    stored = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(stored))
    renew_manifest(checkpoint)
    shutil.copytree(inputs.policy, moved)
    if merge_lora:
        with pytest.raises(UserError, match=r"is missing .*restore it, or set --base_path to"):
            export_checkpoint(checkpoint, tmp_path / "policy", merge_lora=True)
    export_checkpoint(checkpoint, tmp_path / "policy", merge_lora=merge_lora, base_path=str(moved))
    if not merge_lora:
        content = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == str(moved)
    behaviour(*built_by_lerobot(tmp_path / "policy"), CAMERA)

    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / "model.safetensors")
    with pytest.raises(UserError, match="were trained on another base policy"):
        export_checkpoint(checkpoint, tmp_path / "other", merge_lora=merge_lora, base_path=str(moved))
    assert not list(tmp_path.glob("other*"))


def test_damaged_adapters_are_not_exported(adapted, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(adapted("attention"), damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for merge_lora in (True, False):
        with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
            export_checkpoint(damaged, tmp_path / "policy", merge_lora=merge_lora)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_flags_that_do_not_apply_are_refused(adapted, final, inputs, tmp_path):
    for flags, message in (
        ({"merge_lora": True}, "--merge_lora does not apply to .* full training"),
        ({"base_path": str(inputs.policy)}, "--base_path does not apply to .* full training"),
        ({"max_token_difference": 0.1}, "--max_token_difference applies only with --merge_lora"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(final, tmp_path / "policy", **flags)
    with pytest.raises(UserError, match=r"--max_token_difference=1\.5 must be a fraction in"):
        export_checkpoint(
            adapted("attention"), tmp_path / "policy", merge_lora=True, max_token_difference=1.5
        )
    with pytest.raises(UserError, match=r"--device=nowhere is not available \(.*\): remove the flag"):
        export_checkpoint(adapted("attention"), tmp_path / "policy", merge_lora=True, device="nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error_line(adapted, tmp_path, monkeypatch):
    from craft_ds.export import export

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensor_file", full)
    with pytest.raises(UserError, match=r"--output=.*policy cannot be written: .*No space left"):
        export_checkpoint(adapted("attention"), tmp_path / "policy", merge_lora=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_merges_and_prints_the_comparison(adapted, tmp_path, capsys):
    output = tmp_path / "policy"
    command = [str(adapted("rslora")), "--output", str(output), "--merge_lora"]
    capsys.readouterr()
    run_command("export", command)
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"exported {adapted('rslora')} to {output} (float32): merged, and compared with"
    )
    assert "largest logit difference" in printed
    assert printed.count("\n") == 1
    with pytest.raises(SystemExit) as exiting:
        run_command("export", command)
    assert exiting.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_the_help_states_the_bounds(capsys):
    with pytest.raises(SystemExit):
        run_command("export", ["--help"])
    stated = ", ".join(f"{share:g} in {dtype}" for dtype, share in verify_merge.MAX_TOKEN_DIFFERENCE.items())
    assert stated in " ".join(capsys.readouterr().out.split())
