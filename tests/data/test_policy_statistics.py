"""Statistics of data sets for a policy that has none."""

import json
import shutil

import numpy as np
import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

from craft_ds.cli import run_command
from craft_ds.data.policy_statistics import write_policy_with_statistics
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.policies.statistics import check_statistics
from craft_ds.testing.datasets import make_test_dataset


def without_statistics(source, target, *, processors=True):
    """Copy a policy as a base policy on the hub is: its normalisers have no statistics."""
    shutil.copytree(source, target)
    for file in target.glob("policy_*.safetensors"):
        file.unlink()
    for file in target.glob("policy_*processor.json"):
        content = json.loads(file.read_text())
        for step in content["steps"]:
            step.pop("state_file", None)
        file.write_text(json.dumps(content))
        if not processors:
            file.unlink()
    return target


@pytest.fixture
def bare(inputs, tmp_path):
    return without_statistics(inputs.policy, tmp_path / "bare")


def actions(*roots):
    columns = [
        LeRobotDataset("craft-ds/test", root=root, video_backend="pyav")
        .hf_dataset.data.column("action")
        .to_pylist()
        for root in roots
    ]
    return np.concatenate(columns)


@pytest.mark.parametrize("processors", [True, False])
def test_a_base_policy_gets_joint_statistics(inputs, tmp_path, processors):
    bare = without_statistics(inputs.policy, tmp_path / "base", processors=processors)
    output = tmp_path / "out"
    datasets = [("craft-ds/old", str(inputs.old)), ("craft-ds/new", str(inputs.new))]
    assert "200 frames in 2 data sets" in write_policy_with_statistics(str(bare), datasets, output)
    state = load_file(next(output.glob("policy_postprocessor*.safetensors")))
    joint = actions(inputs.old, inputs.new)
    np.testing.assert_allclose(state["action.min"], joint.min(0), rtol=1e-6)
    np.testing.assert_allclose(state["action.q99"], np.quantile(joint, 0.99, axis=0), rtol=1e-6)
    np.testing.assert_allclose(state["action.std"], joint.std(0), rtol=1e-5)
    config = PreTrainedConfig.from_pretrained(output)
    check_statistics(output, config, *make_pre_post_processors(config, pretrained_path=str(output)))
    assert (output / "model.safetensors").samefile(bare / "model.safetensors")


def test_the_command_takes_several_data_sets(inputs, bare, tmp_path, capsys):
    flags = [f"--policy_path={bare}", f"--output_dir={tmp_path / 'out'}"]
    for root in (inputs.old, inputs.new):
        flags += ["--dataset_repo_id=craft-ds/test", f"--dataset_root={root}"]
    run_command("statistics", flags)
    assert "200 frames" in capsys.readouterr().out
    assert run_refused([*flags, "--replace"], capsys).endswith(
        "exists already: choose another or move it away"
    )


def run_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("statistics", flags)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_own_statistics_are_replaced_only_on_demand(inputs, tmp_path):
    datasets = [("craft-ds/new", str(inputs.new))]
    with pytest.raises(UserError, match=r"has statistics already.*--replace"):
        write_policy_with_statistics(str(inputs.policy), datasets, tmp_path / "out")
    write_policy_with_statistics(str(inputs.policy), datasets, tmp_path / "out", replace=True)
    state = load_file(next((tmp_path / "out").glob("policy_preprocessor*.safetensors")))
    np.testing.assert_allclose(state["action.max"], actions(inputs.new).max(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dataset_root=a", "--dataset_root=b"],
            "--dataset_root is given 2 times and --dataset_repo_id 1 times",
        ),
        (["--rename_map=[1]"], "must be JSON"),
        (["--rename_map={'a': 'b'}"], "must be JSON"),
        (["--dataset_root=/nowhere"], "holds no LeRobot data set"),
    ],
)
def test_bad_flags_are_one_line(bare, tmp_path, capsys, flags, message):
    first = [f"--policy_path={bare}", f"--output_dir={tmp_path / 'out'}", "--dataset_repo_id=a/b"]
    line = run_refused([*first, *flags], capsys)
    assert message in line
    assert "\n" not in line


def test_data_sets_of_two_robots_are_refused(inputs, bare, tmp_path):
    other = make_test_dataset(tmp_path / "six", tasks=1, episodes_per_task=1, frames=3, action_dim=6)
    datasets = [("a/b", str(inputs.new)), ("a/c", str(other))]
    with pytest.raises(UserError, match="4 and 6 entries"):
        write_policy_with_statistics(str(bare), datasets, tmp_path / "out")


def check(policy):
    config = load_policy_config(policy)
    check_statistics(policy, config, *load_processors(config, policy))


@pytest.mark.parametrize("key", ["action.min", "observation.state.max"])
def test_a_missing_statistic_is_named_with_its_feature(inputs, tmp_path, key):
    policy = tmp_path / "policy"
    shutil.copytree(inputs.policy, policy)
    for file in policy.glob("policy_*.safetensors"):
        state = load_file(file)
        state.pop(key, None)
        save_file(state, file)
    feature, _, entry = key.rpartition(".")
    with pytest.raises(UserError, match=rf"no statistics \({entry}\) of {feature}.*--normalization=dataset"):
        check(policy)


def test_statistics_of_another_width_are_refused(inputs, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(inputs.policy, policy)
    for file in policy.glob("policy_*.safetensors"):
        save_file({name: value[:3].contiguous() for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"statistics of 3 entries for observation.state, which has 4"):
        check(policy)
