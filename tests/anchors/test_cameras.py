"""Cameras of an old data set under other names, and cameras that it lacks."""

import json
import shutil

import pytest
import torch
from builds import contents, edit_processor, make_dataset, run_script

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.vision import vision_features
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.policies import make_test_policy_dir

TOP, SIDE, FRONT = (f"observation.images.{name}" for name in ("top", "side1", "front"))
EPISODES = [["open"] * 3] * 2


def rename(policy, rename_map):
    edit_processor(policy, lambda steps: steps["rename_observations_processor"].update(rename_map=rename_map))


@pytest.fixture
def policy(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "policy")


@pytest.fixture
def build(options, tmp_path):
    """Build a cache of a data set with these cameras."""

    def build(name, cameras, **changes):
        data = tmp_path / f"data {' '.join(cameras)}"
        if not data.exists():
            make_dataset(data, EPISODES, cameras)
        output = tmp_path / name
        build_anchor_cache(options(output, dataset_root=str(data), num_samples=6, **changes))
        return AnchorCache.open(output)

    return build


def shards(cache):
    return {name: data for name, data in contents(cache.path).items() if name != "metadata.json"}


def test_the_same_images_under_any_name(build, policy):
    """Pictures are drawn camera by camera: equal numbers of cameras are equal data sets but for names."""
    expected = shards(build("plain", ("top", "side1")))
    names = {FRONT: TOP}
    assert shards(build("flag", ("front", "side1"), rename_map=names)) == expected
    rename(policy, names)
    assert shards(build("teacher", ("front", "side1"), policy_path=str(policy))) == expected
    # Names that fit without renaming are accepted too.
    assert shards(build("fitting", ("top", "side1"), policy_path=str(policy))) == expected
    # The flag replaces the teacher's map.
    both = {"observation.images.a": TOP, "observation.images.b": SIDE}
    cache = build("both", ("a", "b"), policy_path=str(policy), rename_map=both)
    assert shards(cache) == expected
    cache.check_policy(load_policy_config(policy))
    assert cache.metadata["request"]["rename_map"] == both


def test_exchanged_names(build, policy):
    straight = build("straight", ("top", "side1")).read(range(6))
    exchanged = build("exchanged", ("top", "side1"), rename_map={TOP: SIDE, SIDE: TOP}).read(range(6))
    assert torch.equal(straight[TOP], exchanged[SIDE])
    assert torch.equal(straight[SIDE], exchanged[TOP])


def refusal(build, *args, **changes):
    with pytest.raises(UserError) as caught:
        build("refused", *args, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_policy")
@pytest.mark.parametrize(
    ("cameras", "names", "words"),
    [
        (("front", "side1"), None, f"lacks the policy's camera {TOP} (it has {FRONT}, {SIDE}): map the"),
        (("top", "side1"), {FRONT: TOP}, f"--rename_map: data set craft-ds/test has no {FRONT}"),
        (("front", "side1"), {FRONT: "top"}, "--rename_map: the policy reads no top"),
        (("top", "side1", "front"), {FRONT: TOP}, f"has {TOP} and {FRONT}, which both become {TOP}"),
        (("top", "side1"), {FRONT: TOP, TOP: SIDE}, f"has {TOP} and {SIDE}, which both become {SIDE}"),
    ],
)
def test_names_that_cannot_be(build, cameras, names, words):
    changes = {} if names is None else {"rename_map": names}
    assert words in refusal(build, cameras, **changes)


def test_a_camera_that_is_renamed_away_is_missing(build):
    cache = build("cache", ("top", "front"), rename_map={TOP: SIDE}, allow_missing_cameras=True)
    assert (cache.cameras, cache.metadata["missing_cameras"]) == ([SIDE], [TOP])


# --- missing cameras --------------------------------------------------------------------------------------


def lerobot_loss(policy, batch):
    """The mean of LeRobot's own forward pass."""
    with torch.no_grad():
        return float(policy.forward(batch)[0])


def test_a_missing_camera_is_masked_as_lerobot_masks_it(build, teacher):
    line = refusal(build, ("side1",))
    assert "--allow_missing_cameras" in line
    cache = build("cache", ("side1",), allow_missing_cameras=True)
    assert cache.cameras == [SIDE]
    assert cache.metadata["missing_cameras"] == [TOP]
    config = load_policy_config(teacher)
    cache.check_policy(config)
    policy = load_policy(config, teacher)
    batch = to_policy_batch(cache.read(range(len(cache))), "cpu")
    assert TOP not in batch
    with torch.no_grad():
        ours = token_loss(policy, batch)
    expected = lerobot_loss(policy, batch)
    assert float(ours.total / ours.count) == pytest.approx(expected, rel=1e-5)
    assert cache.teacher_loss["all"]["overall"] == pytest.approx(expected, rel=1e-5)
    # The mask counts: a black image instead is another sample.
    shown = {**batch, TOP: torch.zeros_like(batch[SIDE])}
    assert abs(lerobot_loss(policy, shown) - expected) > 1e-4
    # A policy without that camera sees the same.
    del config.input_features[TOP]
    cache.check_policy(config)
    assert lerobot_loss(load_policy(config, teacher), batch) == pytest.approx(expected, rel=1e-5)


def test_vision_features_of_the_cameras_that_are_there(build, teacher):
    cache = build("cache", ("side1",), allow_missing_cameras=True, vision_features=True)
    policy = load_policy(load_policy_config(teacher), teacher)
    images = to_policy_batch(cache.read(range(6)), "cpu")
    features = to_policy_batch(cache.read(range(6), vision_features=True), "cpu")
    assert set(features) - set(images) == {f"{SIDE}.vision_features"}
    stored, expected = features[f"{SIDE}.vision_features"], vision_features(policy, images)
    torch.testing.assert_close(stored.float(), expected[f"{SIDE}.vision_features"], rtol=2**-10, atol=1e-6)
    with torch.no_grad():
        one, other = (token_loss(policy, batch) for batch in (images, features))
    assert float(other.total) == pytest.approx(float(one.total), rel=1e-3)


def test_the_flag_without_need_changes_nothing(build):
    plain = build("plain", ("top", "side1"))
    assert contents(build("flag", ("top", "side1"), allow_missing_cameras=True).path) == contents(plain.path)


@pytest.mark.usefixtures("no_policy")
def test_one_camera_is_needed(build):
    line = refusal(build, ("front",), allow_missing_cameras=True)
    assert f"lacks the policy's camera {TOP}, {SIDE}" in line


def test_a_camera_missing_by_mistake_is_refused(build, tmp_path):
    """A cache of a policy with one camera does not fit one with two."""
    single = make_test_policy_dir(tmp_path / "single")
    cache = build("cache", ("top", "side1"), policy_path=str(single))
    cache.check_policy(load_policy_config(single))
    two = make_test_policy_dir(tmp_path / "two", cameras=2)
    with pytest.raises(UserError, match="cameras"):
        cache.check_policy(load_policy_config(two))


def test_empty_cameras_of_the_teacher(build, policy):
    """LeRobot's `empty_cameras` are masked too, without any flag."""
    file = policy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"empty_cameras": 1}))
    cache = build("cache", ("top", "side1"), policy_path=str(policy))
    assert cache.cameras == [TOP, SIDE]
    assert "missing_cameras" not in cache.metadata
    config = load_policy_config(policy)
    loaded = load_policy(config, policy)
    assert "observation.images.empty_camera_0" in loaded.config.image_features
    cache.check_policy(loaded.config)
    batch = to_policy_batch(cache.read(range(len(cache))), "cpu")
    assert cache.teacher_loss["all"]["overall"] == pytest.approx(lerobot_loss(loaded, batch), rel=1e-5)


# --- the command ------------------------------------------------------------------------------------------


def test_the_flags_of_the_command(teacher, tmp_path, monkeypatch, capsys):
    data = make_dataset(tmp_path / "data", EPISODES, ("front",))

    def run(output, *flags):
        status = run_script(
            monkeypatch,
            "--dataset_repo_id=me/old",
            f"--dataset_root={data}",
            f"--policy_path={teacher}",
            f"--output_dir={tmp_path / output}",
            "--num_samples=6",
            "--num_workers=0",
            *flags,
        )
        return status, capsys.readouterr()

    names = "--rename_map=" + json.dumps({FRONT: TOP})
    for output, flag in (("a", "--allow_missing_cameras"), ("b", "--allow_missing_cameras=true")):
        status, printed = run(output, names, flag)
        assert status == 0, printed.err
        assert f"masked cameras, which the data set lacks: {SIDE}" in printed.out
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    status, printed = run("c", names, "--allow_missing_cameras=false")
    assert (status, f"lacks the policy's camera {SIDE}" in printed.err) == (2, True)
    for flag in ("--rename_map=front:top", "--rename_map=[1]", '--rename_map={"a": 1}', "--rename_map={"):
        status, printed = run("c", flag)
        assert (status, printed.err.count("\n")) == (2, 1)
        assert "--rename_map" in printed.err
        assert "must be JSON" in printed.err
    status, printed = run("c", "--allow_missing_cameras=perhaps")
    assert (status, "'perhaps' must be true or false" in printed.err) == (2, True)
    status, printed = run("a", names.replace("front", "other"), "--allow_missing_cameras")
    assert (status, printed.err.count("\n")) == (2, 1)
