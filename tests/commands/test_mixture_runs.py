"""`--datasets`: one run on several data sets."""

import json
import re
import shutil

import pytest
import torch
import yaml
from runs import assert_same_bits, losses

from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.testing.datasets import make_test_dataset


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two data sets of other tasks, with 40 and 60 frames."""
    root = tmp_path_factory.mktemp("pair")
    make_test_dataset(root / "a", tasks=1, episodes_per_task=2, seed=1)
    make_test_dataset(root / "b", tasks=3, episodes_per_task=1, seed=2)
    return root


@pytest.fixture
def mix(train, inputs, pair):
    """Run 4 steps on both data sets."""

    def run(output, *flags, weights=(3, 1), **changes):
        entries = [
            {"repo_id": f"me/{name}", "root": str(pair / name)}
            | ({"weight": weight} if weight is not None else {})
            for name, weight in zip(("a", "b"), weights, strict=True)
        ]
        entries[1] |= changes
        own = [flag for flag in inputs.flags(output) if not flag.startswith("--dataset.")]
        return train(None, *own, f"--datasets={json.dumps(entries)}", *flags)

    return run


def test_a_resumed_mixture_equals_an_uninterrupted_one(mix, train, pair, tmp_path, monkeypatch):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    ended = mix(unbroken, "--steps=6", "--save_freq=3")
    assert ended.status == 0, ended.errors
    assert "✓ data set me/a (75.0% of the samples): 2 episodes, 40 samples" in ended.output
    assert "✓ data set me/b (25.0% of the samples): 3 episodes, 60 samples" in ended.output
    state = torch.load(unbroken / "final" / "craft_state.pt", weights_only=True)
    assert set(state["dataset_fingerprint"]) == {"me/a/meta", "me/a/data", "me/b/meta", "me/b/data"}
    assert state["dataset_samples"] == 100

    shutil.copytree(unbroken, resumed, symlinks=True)
    shutil.rmtree(resumed / "final")
    ended = mix(resumed, "--steps=6", "--save_freq=3", "--resume=auto")
    assert ended.status == 0, ended.errors
    assert "resuming from" in ended.output
    assert "changed since" not in ended.output
    assert_same_bits(resumed / "final", unbroken / "final")

    # Paths are saved absolute, and other forms of them are the same data.
    shutil.rmtree(resumed / "final")
    monkeypatch.chdir(pair)
    entries = [{"repo_id": f"me/{name}", "root": name, "weight": w} for name, w in (("a", 3), ("b", 1))]
    config = f"--config_path={resumed}/step_000003"
    ended = train(None, config, "--resume=true", f"--datasets={json.dumps(entries)}")
    assert ended.status == 0, ended.errors
    assert "--datasets" not in ended.output
    assert_same_bits(resumed / "final", unbroken / "final")


def test_weights_change_what_is_trained(mix, tmp_path):
    for name, weights in (("mostly_a", (1000, 1)), ("mostly_b", (1, 1000)), ("by_frames", (None, None))):
        assert mix(tmp_path / name, weights=weights).status == 0
    assert losses(tmp_path / "mostly_a") != losses(tmp_path / "mostly_b")
    assert losses(tmp_path / "by_frames") != losses(tmp_path / "mostly_a")


def test_a_mixture_of_one_is_that_data_set(mix, train, inputs, pair, tmp_path):
    entry = json.dumps([{"repo_id": "me/b", "root": str(pair / "b"), "episodes": [0, 2]}])
    assert mix(tmp_path / "mixture", f"--datasets={entry}").status == 0
    plain = ["--dataset.repo_id=me/b", f"--dataset.root={pair / 'b'}", "--dataset.episodes=[0,2]"]
    assert train(tmp_path / "plain", *plain).status == 0
    assert losses(tmp_path / "mixture") == losses(tmp_path / "plain")


def test_held_out_episodes_come_from_every_data_set(mix, tmp_path):
    ended = mix(tmp_path / "run", "--eval_freq=4", "--dataset.eval_split=0.3", weights=(None, None))
    assert ended.status != 0  # a task of `b` has one episode, which would be held out
    assert "--dataset.repo_id=me/b" in ended.errors


def test_episodes_are_held_out_of_every_data_set(train, inputs, tmp_path):
    entries = json.dumps(
        [{"repo_id": f"me/{root.name}", "root": str(root)} for root in (inputs.new, inputs.old)]
    )
    flags = [
        *inputs.flags(tmp_path / "run"),
        f"--datasets={entries}",
        "--eval_freq=4",
        "--dataset.eval_split=0.3",
    ]
    flags = [flag for flag in flags if not flag.startswith(("--dataset.repo_id", "--dataset.root"))]
    ended = train(None, *flags)
    assert ended.status == 0, ended.errors
    for line in (r"me/new .*: 2 episodes, .* \(episodes 2, 3", r"me/old .*: 4 episodes, .* \(episodes 4, 5"):
        assert re.search(line, ended.output)
    assert "eval/task_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_file_of_flags_may_hold_a_mixture(train, inputs, pair, tmp_path):
    content = {
        "datasets": [{"repo_id": f"me/{name}", "root": str(pair / name)} for name in ("a", "b")],
        "steps": 2,
        "batch_size": 2,
        "num_workers": 0,
        "dataset": {"video_backend": "pyav"},
    }
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(content))
    flags = [f"--config_path={tmp_path / 'flags.yaml'}", f"--policy.path={inputs.policy}"]
    ended = train(None, *flags, f"--output_dir={tmp_path / 'run'}")
    assert ended.status == 0, ended.errors
    saved = json.loads((tmp_path / "run" / "final" / "train_config.json").read_text())
    assert saved["dataset"]["repo_id"] == "me/a+me/b"
    assert [source["repo_id"] for source in saved["datasets"]] == ["me/a", "me/b"]


def test_statistics_of_a_mixture_are_those_of_all_frames(mix, tmp_path):
    assert mix(tmp_path / "run", "--normalization=dataset", "--data_check=off").status == 0
    final = tmp_path / "run" / "final"
    preprocessor, _ = load_processors(load_policy_config(final), final)
    stats = next(step.stats for step in preprocessor.steps if getattr(step, "stats", None))
    assert float(stats["action"]["count"]) == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset.repo_id=me/c"], "--dataset.repo_id=me/c and --datasets both name data"),
        (["--dataset.root=x"], "--dataset.root=x has no effect with --datasets"),
        (["--dataset.episodes=[0]"], "--dataset.episodes=[0] has no effect with --datasets"),
        (["--datasets=[{repo_id: a}, {repo_id: a}]"], "--datasets names a twice"),
        (["--datasets=[{repo_id: a, weight: 1}, {repo_id: b}]"], "give every entry a weight, or none"),
        (["--datasets=[{repo_id: a, weight: 0}]"], "the weight 0.0 of a must be finite and greater than 0"),
        (["--datasets=[{repo_id: a, wieght: 1}]"], "The fields `wieght` are not valid"),
        (["--datasets=[{repo_id: a, root: none}]"], "--dataset.root=none"),
    ],
)
def test_a_mixture_without_a_meaning_is_refused(mix, tmp_path, flags, message):
    ended = mix(tmp_path / "run", *flags)
    assert ended.status == 2
    assert message in ended.errors
    assert ended.errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_sets_that_differ_are_refused(mix, tmp_path):
    make_test_dataset(tmp_path / "wide", tasks=1, episodes_per_task=2, cameras=("top", "side"))
    ended = mix(tmp_path / "run", root=str(tmp_path / "wide"))
    assert ended.status == 2
    assert "--datasets: me/b has observation.images.side, which me/a lacks" in ended.errors
    make_test_dataset(tmp_path / "fast", tasks=1, episodes_per_task=2, fps=20)
    ended = mix(tmp_path / "run", root=str(tmp_path / "fast"))
    assert ended.status == 0, ended.errors
    assert "20 fps, but 10 in" in ended.output


def test_every_data_set_is_checked_and_named(mix, pair, tmp_path):
    make_test_dataset(tmp_path / "far", tasks=1, episodes_per_task=2, scale=50.0)
    ended = mix(tmp_path / "run", root=str(tmp_path / "far"))
    assert ended.status == 2
    assert "me/b" in ended.errors


def test_another_mixture_does_not_resume(mix, pair, tmp_path):
    run = tmp_path / "run"
    assert mix(run, "--steps=2", "--save_freq=2").status == 0
    other = json.dumps([{"repo_id": "me/a", "root": str(pair / "a"), "weight": 1}])
    ended = mix(run, "--steps=4", "--resume=auto", f"--datasets={other}")
    assert ended.status == 2
    assert "trained with me/a+me/b" in ended.errors
    ended = mix(run, "--steps=4", "--resume=auto", weights=(1, 1))
    assert ended.status == 0, ended.errors
    assert "changed since" in ended.output
    assert "--datasets" in ended.output
