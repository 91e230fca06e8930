"""Cameras of a data set against those of a policy: renamed, missing, or there under both names."""

import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.processor import RenameObservationsProcessorStep

from craft_ds.data.lerobot_dataset import camera_keys, check_features
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.testing.policies import make_test_policy_dir

TOP, SIDE, FRONT = (f"observation.images.{name}" for name in ("top", "side1", "front"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The configuration and the preprocessor of a policy with the cameras top and side1."""
    path = make_test_policy_dir(tmp_path_factory.mktemp("two") / "policy", cameras=2)
    config = load_policy_config(path)
    return config, load_processors(config, path)[0]


@pytest.fixture
def meta(inputs):
    """Metadata of a data set with the camera top; its features may be changed."""
    return LeRobotDatasetMetadata("craft-ds/test", root=inputs.new)


def with_map(pair, **renamed):
    config, preprocessor = pair
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = {
                f"observation.images.{old}": f"observation.images.{new}" for old, new in renamed.items()
            }
    return config, preprocessor


@pytest.mark.parametrize(
    ("renamed", "available", "found"),
    [
        ({}, [TOP, SIDE], {TOP: TOP, SIDE: SIDE}),
        ({"front": "top"}, [FRONT, SIDE], {TOP: FRONT, SIDE: SIDE}),
        ({"front": "top"}, [TOP, SIDE], {TOP: TOP, SIDE: SIDE}),  # fits without renaming
        ({"front": "top"}, [SIDE], {SIDE: SIDE}),
        ({"top": "side1", "side1": "top"}, [TOP], {SIDE: TOP}),
        ({"front": "wrist"}, [TOP, SIDE, FRONT], {TOP: TOP, SIDE: SIDE}),  # not a camera of the policy
    ],
)
def test_each_camera_is_found_under_its_name(two, renamed, available, found):
    assert camera_keys(*with_map(two, **renamed), available) == found


def test_a_camera_under_both_names_is_refused(two):
    with pytest.raises(UserError, match=rf"has {FRONT} and {TOP}, which both become {TOP}"):
        camera_keys(*with_map(two, front="top"), [FRONT, TOP, SIDE])


def test_a_missing_camera_is_named_with_what_there_is(two, meta):
    with pytest.raises(UserError, match=rf"lacks the policy's camera {SIDE} .*{TOP}.*--rename_map"):
        check_features(meta, *with_map(two))
    check_features(meta, *with_map(two), allow_missing_cameras=True)


def test_one_camera_at_least_is_needed(two, meta):
    del meta.info.features[TOP]
    with pytest.raises(UserError, match=rf"lacks the policy's camera {TOP}, {SIDE} \(it has none\)"):
        check_features(meta, *with_map(two), allow_missing_cameras=True)
