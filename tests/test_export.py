"""An exported checkpoint is a policy like any other for stock LeRobot."""

import shutil

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import MetaworldEnv
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file

from craft_ds.errors import UserError
from craft_ds.export import export_checkpoint
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.tiny import TinyPI0FastPolicy


@pytest.fixture(scope="module")
def final(inputs, tmp_path_factory):
    """The final checkpoint of a run of two steps."""
    from craft_ds.command_line import parse_arguments
    from craft_ds.trainer import train_craft

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
    """The action on a fixed observation, as a rollout asks for it, and the loss of a fixed action chunk."""
    rng = torch.Generator().manual_seed(0)
    observation = {
        camera: torch.rand(1, 3, 64, 64, generator=rng),
        "observation.state": torch.rand(1, 4, generator=rng) - 0.5,
        "task": ["press the red button"],
    }
    policy.eval()
    policy.reset()
    policy.config.validate_action_token_prefix = False  # after two steps nobody says "Action:" first
    preprocessor, postprocessor = processors
    action = postprocessor(policy.select_action(preprocessor(dict(observation))))
    chunk = torch.rand(1, 8, 4, generator=rng) - 0.5
    with torch.no_grad():
        loss, _ = policy.forward(preprocessor({**observation, "action": chunk}))
    return action, float(loss)


def test_it_holds_the_policy_and_no_training_state(exported, final):
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


def test_the_weights_are_those_that_were_trained(exported, final, inputs):
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


def test_lerobot_evals_way_of_building_a_policy_acts_the_same(exported, final, inputs):
    """As `lerobot_eval.eval_main` builds them from `--policy.path` for `--env.type=metaworld`."""
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
def test_another_dtype_rounds_the_weights_only(final, tmp_path, dtype):
    output = tmp_path / "policy"
    export_checkpoint(final, output, dtype)
    exact, rounded = load_file(final / "model.safetensors"), load_file(output / "model.safetensors")
    for name, tensor in exact.items():
        assert rounded[name].dtype == (getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype)), name
    TinyPI0FastPolicy.from_pretrained(output, strict=True)


def test_an_export_is_a_teacher_again(exported):
    """Fine-tuning can begin from it: strict loading with the right tokenizers."""
    config = load_policy_config(exported)
    load_policy(config, exported)
    load_processors(config, exported)


def test_an_output_that_exists_is_left_alone(final, tmp_path):
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
def test_what_is_no_checkpoint_is_named(inputs, tmp_path, kind):
    path = inputs.policy if kind == "policy" else tmp_path / "none"
    with pytest.raises(UserError, match=f"{path} is no checkpoint"):
        export_checkpoint(path, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_no_policy(final, tmp_path, monkeypatch):
    from craft_ds import export

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "policy"
    with monkeypatch.context() as patched:
        patched.setattr(export, "_convert", fail)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(final, output)
    assert not output.exists()
    export_checkpoint(final, output)
    assert (output / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
