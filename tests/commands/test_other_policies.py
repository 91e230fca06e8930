"""ACT, diffusion, pi0, pi0.5 and SmolVLA in every engine: losses, save, resume, stock LeRobot.

The policies draw noise for a complete batch. Where runs of several ranks are compared with one process, every
sample gets the same draws (`pinned_draws`); ACT's KL term has weight 0 there, since its samples are weighted
by their action steps. Everything else is as in a user's run.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import ForkServer
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from runs import assert_same_bits, assert_trained, losses, metrics
from safetensors.torch import load_file

from craft_ds.cli import run_command
from craft_ds.policies import support
from craft_ds.testing.small_policies import (
    OTHER_POLICIES,
    make_small_policy_dir,
    pinned_draws,
    small_sizes,
)

pytestmark = pytest.mark.slow

PINNED = {"act": ["--policy.kl_weight=0.0", "--policy.use_vae=true"]}
ENGINES = {"fsdp": ["--engine=fsdp"], "zero2": ["--ds_config=zero2"], "zero3": ["--ds_config=zero3"]}
SAVING = ["--batch_size=4", "--save_freq=2"]
MEAN = "diffusion.rgb_encoder.0.backbone.1.running_mean"


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    made = {name: make_small_policy_dir(root / name, name) for name in OTHER_POLICIES}
    return made | {"batch_norm": make_small_policy_dir(root / "norm", "diffusion", use_group_norm=False)}


def flags_of(inputs, policy: Path, output: Path) -> list[str]:
    return [*inputs.flags(output), f"--policy.path={policy}", "--seed=3", "--steps=3"]


@pytest.fixture(scope="module")
def single(inputs, others, tmp_path_factory):
    """Run of each type in one process: 3 steps of 4 samples, a checkpoint after 2."""
    root = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patched, small_sizes(), pinned_draws():
        for name in OTHER_POLICIES:
            flags = [*flags_of(inputs, others[name], root / name), *SAVING, *PINNED.get(name, [])]
            patched.setattr("sys.argv", ["train_craft.py", *flags])
            run_command("train", flags)
        flags = [*flags_of(inputs, others["batch_norm"], root / "batch_norm"), "--batch_size=2", "--steps=1"]
        patched.setattr("sys.argv", ["train_craft.py", *flags])
        run_command("train", flags)
    return root


def run_on_ranks(
    server: ForkServer, commands: dict[str, list[str]], scratch: Path, world_size: int
) -> list[dict]:
    (scratch / "commands.json").write_text(json.dumps(commands))
    program = Path(__file__).with_name("other_policy_ranks.py")
    server.run([scratch / "commands.json", scratch], world_size, program=program, timeout=400).check()
    return [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def two_ranks(inputs, others, fork_server, tmp_path_factory):
    """Every type in every engine on 2 ranks, 2 samples each, as in `single`."""
    scratch = tmp_path_factory.mktemp("two_ranks")
    commands = {}
    for engine, engine_flags in ENGINES.items():
        for name in OTHER_POLICIES:
            output = scratch / f"{name}_{engine}"
            flags = [*flags_of(inputs, others[name], output), "--save_checkpoint=false"]
            commands[output.name] = [*flags, *engine_flags, *PINNED.get(name, [])]
        craft = [*flags_of(inputs, others["act"], scratch / f"craft_{engine}"), *inputs.craft_flags()]
        commands[f"craft_{engine}"] = [*craft, *engine_flags]
    norm = flags_of(inputs, others["batch_norm"], scratch / "batch_norm")
    commands["batch_norm"] = [*norm, "--batch_size=1", "--steps=1", *ENGINES["fsdp"]]
    return scratch, run_on_ranks(fork_server, commands, scratch, 2)


@pytest.fixture(scope="module")
def three_ranks(inputs, single, tmp_path_factory):
    """The last step of `single` on 3 ranks, which take 2, 1 and 1 of its 4 samples."""
    scratch = tmp_path_factory.mktemp("three_ranks")
    commands = {}
    for name in OTHER_POLICIES:
        run = scratch / name
        shutil.copytree(single / name / "step_000002", run / "step_000002")
        resumed = f"--config_path={run}/step_000002/train_config.json"
        commands[name] = [resumed, "--resume=true", f"--output_dir={run}", "--engine=fsdp"]
    return scratch, run_on_ranks(commands, scratch, 3)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_two_ranks_have_the_losses_of_one_process(single, two_ranks, name, engine):
    scratch, ranks = two_ranks
    label = f"{name}_{engine}"
    assert [rank[label]["status"] for rank in ranks] == [0, 0], ranks[0][label]["errors"]
    assert losses(scratch / label) == pytest.approx(losses(single / name), rel=1e-4)
    found, expected = (
        [row["train/grad_norm"] for row in metrics(run) if "train/grad_norm" in row]
        for run in (scratch / label, single / name)
    )
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.sample(0)
@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_three_ranks_with_unequal_batches_resume_one_process(single, three_ranks, name):
    scratch, ranks = three_ranks
    assert [rank[name]["status"] for rank in ranks] == [0, 0, 0], ranks[0][name]["errors"]
    assert losses(scratch / name)[-1:] == pytest.approx(losses(single / name)[2:], rel=1e-4)
    found, expected = (load_file(run / name / "final" / "model.safetensors") for run in (scratch, single))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key].float(), tensor.float(), atol=2e-4), key


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_craft_with_another_policy_ends_all_ranks(two_ranks, engine):
    scratch, ranks = two_ranks
    assert [rank[f"craft_{engine}"]["status"] for rank in ranks] == [2, 2]
    message = ranks[0][f"craft_{engine}"]["errors"]
    assert message.startswith("error: --craft.enabled=true: CRaFT is for policies of type pi0_fast")
    assert message.count("\n") == 1
    assert ranks[1][f"craft_{engine}"]["errors"] == ""
    assert not (scratch / f"craft_{engine}").exists()


@pytest.mark.distributed
def test_running_statistics_are_averaged_over_ranks(single, two_ranks):
    """The first mean of 2 samples in one process is the average of those of 1 sample on each rank."""
    scratch, ranks = two_ranks
    assert ranks[0]["batch_norm"]["status"] == 0, ranks[0]["batch_norm"]["errors"]
    assert "warning: 21 batch normalisations use the statistics of each" in ranks[0]["batch_norm"]["output"]
    found, expected = (
        load_file(run / "batch_norm" / "final" / "model.safetensors")[MEAN] for run in (scratch, single)
    )
    assert expected.abs().max() > 1e-4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_a_resumed_run_has_the_same_bits(inputs, others, train, tmp_path, name):
    """With the policy's own random draws, dropout included."""
    dropout = ["--policy.dropout=0.1"] if name == "act" else []
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    flags = [f"--policy.path={others[name]}", "--steps=3", "--save_freq=2", *dropout]
    with small_sizes():
        assert train(unbroken, *flags).status == 0
        shutil.copytree(unbroken / "step_000002", run / "step_000002")
        resumed = [f"--config_path={run}/step_000002/train_config.json", f"--output_dir={run}"]
        ended = train(None, *resumed, "--resume=true")
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", unbroken / "final")


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_stock_lerobot_loads_what_was_trained(single, others, name):
    final = single / name / "final"
    assert_trained(final, others[name])
    saved = load_file(final / "model.safetensors")
    with small_sizes(), torch.no_grad():
        policy = get_policy_class(name).from_pretrained(final)
        preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(final))
        loaded = policy.state_dict()
        for key, tensor in saved.items():
            assert torch.equal(loaded[key], tensor), key
        observation = {
            "observation.images.top": torch.rand(3, 64, 64),
            "observation.state": torch.rand(4),
            "task": "press the red button",
        }
        policy.reset()
        action = postprocessor(policy.select_action(preprocessor(observation)))
    assert action.shape[-1] == 4
    assert action.isfinite().all()


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_craft_is_refused_before_anything_is_loaded(inputs, others, refuses, tmp_path, name):
    with small_sizes():
        message = refuses(
            tmp_path / "run",
            f"--policy.path={others[name]}",
            "--craft.enabled=true",
            f"--craft.anchor_cache_dir={tmp_path}/none",
            "--dataset.root=/nowhere",
        )
    assert message == (
        f"--craft.enabled=true: CRaFT is for policies of type pi0_fast, and this one is of type {name}: "
        "train it without CRaFT, or choose a pi0_fast policy"
    )


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_anchors_of_another_teacher_are_refused(others, tmp_path, capsys, name):
    output = tmp_path / "anchors"
    with pytest.raises(SystemExit) as ended:
        run_command(
            "anchors",
            [
                "--dataset_repo_id=craft-ds/test",
                "--dataset_root=/nowhere",
                f"--policy_repo_id={others[name]}",
                f"--output_dir={output}",
            ],
        )
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: the teacher {others[name]}: CRaFT is for policies of type pi0_fast")
    assert message.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(("name", "package"), [("diffusion", "diffusers"), ("smolvla", "num2words")])
def test_a_missing_package_is_named(others, refuses, tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    message = refuses(tmp_path / "run", f"--policy.path={others[name]}", "--dataset.root=/nowhere")
    assert message == f"a policy of type {name} needs the package {package}: pip install 'lerobot[{name}]'"


def test_a_world_of_single_observations_needs_one_step(others, refuses, tmp_path):
    with small_sizes():
        message = refuses(
            tmp_path / "run", f"--policy.path={others['diffusion']}", "--world.name=blocks", "--eval_freq=1"
        )
    assert "n_obs_steps=2" in message
