"""`--alpha=auto`: the choice against its definition, the sweep against the formula, and complete searches."""

import json
import math
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot.configs.default import DatasetConfig
from lerobot.utils.collate import lerobot_collate_fn
from safetensors.torch import load_file
from torch import nn

from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.commands.export import main
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.lerobot_dataset import open_dataset
from craft_ds.data.task_data import load_datasets
from craft_ds.errors import UserError
from craft_ds.export.alpha_choice import AlphaLosses, choose_alpha
from craft_ds.export.alpha_search import sweep
from craft_ds.export.export import export_checkpoint
from craft_ds.export.heldout_frames import heldout_episodes, heldout_frames
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.datasets import make_test_dataset

SEARCH = ["--alpha=auto", "--anchor_cache_dir=a", "--epsilon=1"]
losses = st.sampled_from([0.0, 0.1, 0.2, 0.5, math.nan]) | st.floats(0, 5)
shares = st.sampled_from([tenths / 10 for tenths in range(11)])


@given(st.lists(st.tuples(shares, losses, losses), max_size=8), st.floats(0, 1), st.booleans())
def test_the_choice_satisfies_the_constraint(rows, epsilon, with_task):
    rows = [AlphaLosses(alpha, anchors, task if with_task else None) for alpha, anchors, task in rows]
    chosen = choose_alpha(rows, epsilon)
    within = [
        row for row in rows if row.anchor_loss <= epsilon and not (with_task and math.isnan(row.task_loss))
    ]
    assert (chosen is None) == (not within)
    if within:
        assert chosen in within
        best = min(row.task_loss for row in within) if with_task else min(row.alpha for row in within)
        assert (chosen.task_loss if with_task else chosen.alpha) == best


def test_chosen_shares():
    rows = [AlphaLosses(0.0, 1.5, 0.2), AlphaLosses(0.5, 0.9, 0.4), AlphaLosses(1.0, 0.3, 2.0)]
    assert choose_alpha(rows, 0.9).alpha == 0.5  # equality satisfies it
    assert choose_alpha(rows, 0.8).alpha == 1.0
    assert choose_alpha(rows, 0.2) is None
    barely = [AlphaLosses(0.4, 0.5, 0.3), AlphaLosses(0.6, 0.4, 0.25)]
    assert choose_alpha(barely, 1.0).alpha == 0.6  # the task loss decides
    assert choose_alpha([row._replace(task_loss=None) for row in barely], 1.0).alpha == 0.4


def test_the_sweep_moves_the_weights_by_the_formula():
    generator = torch.Generator().manual_seed(0)
    policy = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    for parameter in policy.parameters():
        nn.init.normal_(parameter, generator=generator)
    own = {name: tensor.clone() for name, tensor in policy.state_dict().items() if tensor.is_floating_point()}
    others = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}
    seen = {}

    def measure(alpha):
        seen[alpha] = {name: policy.state_dict()[name].clone() for name in own}
        return AlphaLosses(alpha, 0.0)

    rows = sweep(policy, others, [1.0, 0.3, 0.0, 0.9, 0.3], measure)
    assert [row.alpha for row in rows] == [0.0, 0.3, 0.9, 1.0]
    for alpha, weights in seen.items():
        for name, found in weights.items():
            expected = (1 - alpha) * own[name].double() + alpha * others[name].double()
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(seen[1.0][name], others[name]) for name in own)


@pytest.mark.parametrize(("share", "episodes"), [(0.34, None), (0.5, [0, 5, 3, 1, 2])])
def test_held_out_episodes_are_those_of_training(inputs, monkeypatch, share, episodes):
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])
    policy = load_policy_config(inputs.policy)
    policy.pretrained_path = inputs.policy
    data = DatasetConfig("craft-ds/test", root=str(inputs.old), episodes=episodes, eval_split=share)
    config = TrainConfig(dataset=data, policy=policy)
    config.validate()
    _, heldout = load_datasets(config)
    texts = heldout.meta.episodes["tasks"]
    task_of = {number: texts[number][0] for number in episodes or range(6)}
    assert heldout_episodes(task_of, share) == set(heldout.episodes)


# --- end to end -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def final(inputs, tmp_path_factory):
    """The final checkpoint of a run of three large steps that held out an episode."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    output = tmp_path_factory.mktemp("runs") / "run"
    large = ["--steps=3", "--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0"]
    flags = [*inputs.flags(output), *large, "--dataset.eval_split=0.25", "--checkpoint.layout=per_rank"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        return train_craft(parse_arguments(flags))


@pytest.fixture
def export(final, inputs, tmp_path, capsys):
    """Run `craft-ds export`; return its rows, the chosen α and what it printed."""

    def run(*flags, teacher=None, name="mixed"):
        arguments = [str(final), f"--output={tmp_path / name}", f"--merge_with={teacher or inputs.policy}"]
        main([*arguments, *map(str, flags)])
        found = json.loads((tmp_path / f"{name}_alphas.json").read_text())
        return found["rows"], found["chosen"], capsys.readouterr().out

    return run


@torch.no_grad()
def measured(path, batches):
    """Mean loss per token of a policy directory."""
    policy = load_policy(load_policy_config(path), path).eval()
    found = [token_loss(policy, batch) for batch in batches]
    return float(sum(loss.total for loss in found) / sum(loss.count for loss in found))


@pytest.mark.slow
def test_a_search_measures_what_is_exported(final, inputs, export, tmp_path):
    cache = AnchorCache.open(inputs.anchors)
    teacher_loss = cache.teacher_loss["heldout"]["overall"]
    data = ["--dataset_repo_id=craft-ds/test", f"--dataset_root={inputs.new}"]
    search = ["--alphas", "0.6", "0", "1", "0.3", f"--anchor_cache_dir={inputs.anchors}", *data]
    rows, chosen, printed = export(*search, "--epsilon=1.02", "--epsilon_relative")
    assert [row["alpha"] for row in rows] == [0, 0.3, 0.6, 1]
    assert rows[-1]["anchor_loss"] == pytest.approx(teacher_loss, rel=1e-5)
    within = [row for row in rows if row["anchor_loss"] <= 1.02 * teacher_loss]
    assert chosen == min(within, key=lambda row: row["task_loss"])["alpha"]
    assert len(printed.splitlines()) == 6
    assert f"and {chosen:g} of those of {inputs.policy}; chosen of 4" in printed

    anchors = [to_policy_batch(cache.read([row]), "cpu") for row in cache.splits["heldout"]]
    config = load_policy_config(final)
    preprocessor, _ = load_processors(config, final)
    samples = open_dataset("craft-ds/test", inputs.new, config, preprocessor)
    last_episode = range(60, 80)
    frames = [preprocessor(lerobot_collate_fn([samples[row]])) for row in last_episode]
    for row in rows:
        path = tmp_path / f"{row['alpha']:g}"
        export_checkpoint(final, path, merge_with=str(inputs.policy), alpha=row["alpha"])
        assert row["anchor_loss"] == pytest.approx(measured(path, anchors), rel=1e-5)
        assert row["task_loss"] == pytest.approx(measured(path, frames), rel=1e-5)
    weights = load_file(tmp_path / f"{chosen:g}" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "mixed" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow
def test_without_episodes_the_smallest_share_wins(inputs, export, tmp_path):
    anchors = f"--anchor_cache_dir={inputs.anchors}"
    rows, chosen, _ = export("--alpha=auto", anchors, "--epsilon=9", name="any")
    assert [row["alpha"] for row in rows] == [tenths / 10 for tenths in range(11)]
    assert (chosen, {row["task_loss"] for row in rows}) == (0.0, {None})
    middle = rows[4]["anchor_loss"]
    _, chosen, _ = export("--alpha=auto", anchors, f"--epsilon={middle}", name="some")
    assert chosen == next(row["alpha"] for row in rows if row["anchor_loss"] <= middle)
    with pytest.raises(
        UserError, match=r"no share of .* the lowest is .* at alpha=.*_alphas.json.*raise --epsilon"
    ):
        export("--alpha=auto", anchors, "--epsilon=0.5", "--max_eval_samples=2", name="none")
    report = json.loads((tmp_path / "none_alphas.json").read_text())
    assert (report["chosen"], len(report["rows"])) == (None, 11)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_other_demonstrations_are_all_held_out(inputs, export, tmp_path):
    other = make_test_dataset(tmp_path / "other", tasks=1, episodes_per_task=1, frames=9, seed=7)
    data = ["--dataset_repo_id=craft-ds/other", f"--dataset_root={other}", "--max_eval_samples=4"]
    anchors = f"--anchor_cache_dir={inputs.anchors}"
    rows, _, _ = export("--alphas", "0.5", anchors, "--epsilon=9", *data)
    assert rows[0]["task_loss"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha=auto"], "--alpha=auto chooses by the loss on held-out anchors: give --anchor_cache_dir"),
        (["--alphas", "0.5", "--anchor_cache_dir=a"], "give --epsilon"),
        (["--alpha=0.3", "--epsilon=1"], "--epsilon applies only with --alpha=auto"),
        (["--alpha=0.3", "--alphas", "0.3"], "--alpha=0.3 and --alphas"),
        (["--alpha=auto", "--anchor_cache_dir=a", "--epsilon=-1"], "--epsilon=-1.0 must be finite"),
        (["--alphas", "2", "--anchor_cache_dir=a", "--epsilon=1"], "--alphas: 2.0 must lie in"),
        (SEARCH, "no anchor cache at a"),
        (
            [*SEARCH, "--dataset_root=b"],
            "--dataset_root needs --dataset_repo_id",
        ),
        (
            [*SEARCH, "--epsilon_relative", "--retention_loss=hidden"],
            "the teacher's own hidden is 0",
        ),
    ],
)
@pytest.mark.slow
def test_flags_without_effect_are_refused(final, export, tmp_path, flags, message):
    with pytest.raises(UserError) as caught:
        export(*flags)
    assert message in str(caught.value)
    assert not (tmp_path / "mixed").exists()


@pytest.mark.slow
def test_a_search_needs_a_teacher_held_out_anchors_and_targets(final, inputs, export, tmp_path):
    anchors = [f"--anchor_cache_dir={inputs.anchors}", "--epsilon=1"]
    with pytest.raises(UserError, match="--alpha=auto applies only with --merge_with"):
        main([str(final), f"--output={tmp_path / 'out'}", "--alpha=auto", *anchors])
    with pytest.raises(UserError, match="holds no such targets"):
        export("--alpha=auto", *anchors, "--retention_loss=teacher_kl")
    trained = inputs.build_anchors(tmp_path / "trained", heldout_fraction=0.0)
    with pytest.raises(UserError, match="has no held-out anchors"):
        export("--alpha=auto", f"--anchor_cache_dir={trained}", "--epsilon=1")


@pytest.mark.slow
def test_the_training_episodes_are_not_measured(final, inputs, tmp_path):
    run = json.loads((final / "train_config.json").read_text())
    run["dataset"]["eval_split"] = 0.0
    for flag in ("craft-ds/test", "me/moved"):  # known by its files, not by its name
        copy = shutil.copytree(final, tmp_path / flag.replace("/", "_"))
        (copy / "train_config.json").write_text(json.dumps(run))
        with pytest.raises(UserError, match="none of its episodes was held out"):
            heldout_frames(copy, load_policy_config(copy), flag, str(inputs.new), 0, "cpu")
