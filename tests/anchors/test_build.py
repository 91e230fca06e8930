import json
import shutil

import pytest
import torch
from builds import Killed, contents, refuses, run_script
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import default_collate

from craft_ds.anchors import build
from craft_ds.anchors.build import BuildOptions, build_anchor_cache
from craft_ds.anchors.cache import AnchorCache, partial_directory
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.errors import UserError
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.tiny_pi0_fast.tokenizers import build_text_tokenizer
from craft_ds.policies.token_loss import token_loss
from craft_ds.tensor_io import filesystem
from craft_ds.testing.adapters import make_test_adapters
from craft_ds.testing.datasets import make_test_dataset


def dataset_batch(data, config, teacher, rows):
    """Return the output of the teacher's preprocessor for rows of the data set: the reference."""
    dataset = LeRobotDataset("craft-ds/test", root=data, video_backend="pyav")
    deltas = resolve_delta_timestamps(config, dataset.meta)
    dataset = LeRobotDataset("craft-ds/test", root=data, video_backend="pyav", delta_timestamps=deltas)
    preprocessor, _ = load_processors(config, teacher)
    return preprocessor(default_collate([dataset[row] for row in rows]))


def test_a_batch_is_bit_for_bit_what_the_preprocessor_gives(built, data, teacher):
    cache = AnchorCache.open(built)
    everything = cache.read(range(len(cache)))
    assert everything["frame"].max() > 12 - 8, "no episode tail among the anchors"
    rows = (everything["episode"] * 12 + everything["frame"]).tolist()
    assert len(set(rows)) == 22
    expected = dataset_batch(data, load_policy_config(teacher), teacher, rows)
    batch = to_policy_batch(everything, "cpu")
    assert set(batch) == {*cache.cameras, *build.TOKEN_FIELDS}
    for name, tensor in batch.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_metadata(built):
    cache = AnchorCache.open(built)
    assert cache.tasks == ["press the red button", "close the drawer"]
    assert torch.bincount(cache.task).tolist() == [11, 11]
    assert len(cache.splits["heldout"]) == pytest.approx(22 / 3, abs=2)
    episodes = cache.metadata["dataset"]["episodes"]
    assert len(episodes["heldout"]) == 2
    assert not set(episodes["heldout"]) & set(episodes["train"])
    assert [shard["samples"] for shard in cache.metadata["shards"]] == [6, 6, 6, 4]
    assert (built / "shard_00000.safetensors").stat().st_mode & 0o777 == 0o644


def test_teacher_loss(built, teacher):
    cache = AnchorCache.open(built)
    policy = load_policy(load_policy_config(teacher), teacher)

    def mean(indices):
        with torch.no_grad():
            loss = token_loss(policy, to_policy_batch(cache.read(indices), "cpu"))
        return float(loss.total / loss.count), int(loss.count)

    for split, indices in {**cache.splits, "all": range(len(cache))}.items():
        overall, tokens = mean(indices)
        assert cache.teacher_loss[split]["overall"] == pytest.approx(overall, rel=1e-5)
        assert cache.teacher_loss[split]["tokens"] == tokens
        for number, text in enumerate(cache.tasks):
            of_task, _ = mean([i for i in indices if cache.task[i] == number])
            assert cache.teacher_loss[split]["by_task"][text] == pytest.approx(of_task, rel=1e-5)


def test_same_flags_same_bytes(built, options, tmp_path):
    build_anchor_cache(options(tmp_path / "cache"))
    assert contents(tmp_path / "cache") == contents(built)


@pytest.mark.usefixtures("no_policy")
def test_a_build_that_is_there_is_left_alone(built, options):
    before = {file.name: file.stat().st_mtime_ns for file in built.iterdir()}
    assert not build_anchor_cache(options(built))
    assert {file.name: file.stat().st_mtime_ns for file in built.iterdir()} == before


@pytest.mark.parametrize("moment", ["in a shard", "behind a shard", "before the metadata", "before the end"])
def test_an_interrupted_build_is_continued(built, options, tmp_path, monkeypatch, moment):
    output = tmp_path / "cache"
    calls = []

    def die(module, name, on_call):
        original = getattr(module, name)

        def wrapper(*args):
            calls.append(name)
            if calls.count(name) == on_call:
                raise Killed
            return original(*args)

        monkeypatch.setattr(module, name, wrapper)

    where = {
        "in a shard": (filesystem, "fsync", 4),
        "behind a shard": (build, "_write_json", 3),
        "before the metadata": (build, "_teacher_loss", 1),
        "before the end": (build, "_write_json", 6),
    }
    die(*where[moment])
    with pytest.raises(Killed):
        build_anchor_cache(options(output))
    with pytest.raises(UserError, match="interrupted"):
        AnchorCache.open(output)
    monkeypatch.undo()

    written = []
    original = build._write_shard
    monkeypatch.setattr(build, "_write_shard", lambda *args: [written.append(args[1]), original(*args)])
    assert build_anchor_cache(options(output))
    assert written == {"in a shard": [1, 2, 3], "behind a shard": [1, 2, 3]}.get(moment, [])
    assert contents(output) == contents(built)
    assert not partial_directory(output).exists()


def test_model_resolution(options, teacher, tmp_path):
    data = make_test_dataset(
        tmp_path / "wide", cameras=("top", "side1"), episodes_per_task=1, frames=3, image_size=(40, 96)
    )
    paths = {size: tmp_path / size for size in ("dataset", "model")}
    for size, path in paths.items():
        build_anchor_cache(options(path, dataset_root=str(data), num_samples=6, image_size=size))
    exact, small = (AnchorCache.open(path) for path in paths.values())
    assert exact.read([0])["observation.images.top"].shape == (1, 3, 40, 96)
    assert small.read([0])["observation.images.top"].shape == (1, 3, 64, 64)
    config = load_policy_config(teacher)
    for cache in (exact, small):
        cache.check_policy(config)
    policy = load_policy(config, teacher)
    seen = [
        policy._preprocess_images(to_policy_batch(cache.read(range(6)), "cpu"))[0] for cache in (exact, small)
    ]
    for one, other in zip(*seen, strict=True):
        # [0, 255] became [-1, 1]: half a level of rounding is 1/255.
        assert (one - other).abs().max() <= 1 / 255 + 1e-6
        assert (one - other).abs().max() > 0
    config.image_resolution = (32, 32)
    exact.check_policy(config)
    with pytest.raises(UserError, match="image shape"):
        small.check_policy(config)


def test_renamed_cameras(options, teacher, tmp_path):
    data = make_test_dataset(tmp_path / "data", cameras=("front", "side1"), episodes_per_task=1, frames=3)
    policy = tmp_path / "policy"
    shutil.copytree(teacher, policy)
    pipeline = json.loads((policy / "policy_preprocessor.json").read_text())
    (rename,) = [s for s in pipeline["steps"] if s["registry_name"] == "rename_observations_processor"]
    rename["config"]["rename_map"] = {"observation.images.front": "observation.images.top"}
    (policy / "policy_preprocessor.json").write_text(json.dumps(pipeline))
    output = tmp_path / "cache"
    build_anchor_cache(options(output, dataset_root=str(data), policy_path=str(policy), num_samples=6))
    assert AnchorCache.open(output).cameras == ["observation.images.top", "observation.images.side1"]


def test_the_policy_must_fit(built, teacher, tmp_path):
    cache = AnchorCache.open(built)
    config = load_policy_config(teacher)
    cache.check_policy(config)

    def refuses(*words):
        with pytest.raises(UserError) as caught:
            cache.check_policy(config)
        for word in (str(built), str(teacher), *words):
            assert word in str(caught.value)

    side = config.input_features.pop("observation.images.side1")
    refuses("cameras", "observation.images.side1")
    config.input_features["observation.images.side1"] = side
    config.max_action_tokens = 16
    refuses("max_action_tokens 24 in the cache, 16 in the policy")
    config.max_action_tokens = 24
    build_text_tokenizer(("fold the towel",), tmp_path / "text")
    config.text_tokenizer_name = str(tmp_path / "text")
    refuses("tokenizers")


@pytest.mark.usefixtures("no_policy")
class TestBadInput:
    def test_output_exists(self, options, built, tmp_path):
        refuses(options(tmp_path), "--output_dir", tmp_path)
        before = contents(built)
        refuses(options(built, seed=1), "--output_dir", "request.seed")
        assert contents(built) == before

    def test_interrupted_build_with_other_flags(self, options, tmp_path):
        with pytest.raises(AssertionError, match="loaded first"):
            build_anchor_cache(options(tmp_path / "cache"))
        refuses(
            options(tmp_path / "cache", num_samples=21), partial_directory(tmp_path / "cache"), "num_samples"
        )

    def test_missing_data_set(self, options, tmp_path):
        refuses(options(tmp_path / "out", dataset_root=str(tmp_path / "none")), "--dataset_root", "info.json")
        assert not (tmp_path / "none").exists()

    def test_data_set_of_the_hub_without_network(self, options, tmp_path, monkeypatch):
        monkeypatch.setattr(build.open_dataset.__globals__["LeRobotDatasetMetadata"], "__init__", _offline)
        refuses(
            options(tmp_path / "out", dataset_repo_id="nobody/nothing", dataset_root=None),
            "nobody/nothing",
            "--dataset_root",
        )

    def test_unfinished_data_set(self, options, data, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(data, broken)
        (file,) = (broken / "data").rglob("*.parquet")
        file.write_bytes(file.read_bytes()[:-4])
        refuses(options(tmp_path / "out", dataset_root=str(broken)), file, "finalize")
        shutil.rmtree(broken / "meta" / "episodes")
        refuses(options(tmp_path / "out", dataset_root=str(broken)), "meta/episodes", "finalize")

    def test_missing_camera(self, options, tmp_path):
        data = make_test_dataset(tmp_path / "data", episodes_per_task=1, frames=3)
        refuses(options(tmp_path / "out", dataset_root=str(data)), "observation.images.side1")

    def test_other_state(self, options, tmp_path):
        data = make_test_dataset(
            tmp_path / "data", cameras=("top", "side1"), episodes_per_task=1, frames=3, state_dim=7
        )
        refuses(
            options(tmp_path / "out", dataset_root=str(data), num_samples=6),
            "observation.state has",
            "entries",
        )

    def test_too_many_samples(self, options, tmp_path):
        refuses(options(tmp_path / "out", num_samples=73), "--num_samples=73", "72 frames")

    def test_missing_policy(self, options, teacher, tmp_path):
        refuses(options(tmp_path / "out", policy_path=str(tmp_path / "none")), tmp_path / "none")
        shutil.copytree(teacher, tmp_path / "policy")
        (tmp_path / "policy" / "model.safetensors").unlink()
        refuses(options(tmp_path / "out", policy_path=str(tmp_path / "policy")), "model.safetensors")

    @pytest.mark.parametrize(
        "flag", ["num_samples=0", "batch_size=0", "shard_size=0", "num_workers=-1", "heldout_fraction=1.0"]
    )
    def test_values_out_of_range(self, options, tmp_path, flag):
        name, value = flag.split("=")
        with pytest.raises(UserError, match=f"--{flag}"):
            options(tmp_path / "out", **{name: type(getattr(BuildOptions, name))(value)})


def _offline(*args, **kwargs):
    raise ConnectionError("offline\nand more")


def test_script(data, teacher, built, tmp_path, monkeypatch, capsys):
    flags = [
        "--dataset_repo_id=craft-ds/test",
        f"--dataset_root={data}",
        f"--output_dir={tmp_path / 'cache'}",
        "--num_samples=22",
        "--batch_size=4",
        "--shard_size=6",
    ]
    assert run_script(monkeypatch, *flags, f"--policy_repo_id={teacher}", "--num_workers=2") == 0
    out, err = capsys.readouterr()
    assert out.startswith("built: ")
    assert "22/22" in err
    assert "sample/s" in err
    assert contents(tmp_path / "cache") == contents(built)
    assert run_script(monkeypatch, *flags, f"--policy_path={teacher}", "--num_workers=0") == 0
    assert capsys.readouterr().out.startswith("already built: ")
    assert run_script(monkeypatch, *flags, f"--policy_path={teacher}", "--seed=7") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run_script(monkeypatch, *flags, f"--policy_path={teacher}", "--num_sample=7") == 2
    assert "--num_sample=7" in capsys.readouterr().err


def test_a_teacher_with_adapters(options, teacher, tmp_path):
    """Its own loss is that of the adapters on their base, and the fingerprint is of both."""
    adapted = make_test_adapters(teacher, tmp_path / "adapted")
    assert build_anchor_cache(options(tmp_path / "cache", policy_path=str(adapted)))
    assert build_anchor_cache(options(tmp_path / "plain"))
    cache, plain = (AnchorCache.open(tmp_path / name) for name in ("cache", "plain"))
    policy = load_trained_policy(load_policy_config(adapted), adapted)
    with torch.no_grad():
        loss = token_loss(policy, to_policy_batch(cache.read(range(len(cache))), "cpu"))
    found = cache.teacher_loss["all"]["overall"]
    assert found == pytest.approx(float(loss.total / loss.count), rel=1e-4)
    assert found != plain.teacher_loss["all"]["overall"]
    hashes = {cache.metadata["teacher"]["weights_sha256"], plain.metadata["teacher"]["weights_sha256"]}
    assert len(hashes) == 2
    # Adapters change no token: these anchors fit the base too.
    cache.check_policy(load_policy_config(teacher))
