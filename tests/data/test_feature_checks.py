"""Features of a data set against those of a policy."""

from types import SimpleNamespace

import pytest

from craft_ds.data.feature_checks import check_pictures, check_vectors
from craft_ds.errors import UserError

CAMERA = "observation.images.top"


def vector(width, names=None):
    return {"dtype": "float32", "shape": (width,), "names": names}


def picture(height=64, width=64, channels=3, first=False):
    if first:
        return {
            "dtype": "video",
            "shape": (channels, height, width),
            "names": ["channels", "height", "width"],
        }
    return {"dtype": "image", "shape": (height, width, channels), "names": ["height", "width", "channels"]}


def policy(state=4, action=4, size=(64, 64), **fields):
    return SimpleNamespace(
        type=fields.pop("type", "pi0_fast"),
        input_features={} if state is None else {"observation.state": SimpleNamespace(shape=(state,))},
        output_features={"action": SimpleNamespace(shape=(action,))},
        image_features={CAMERA: SimpleNamespace(shape=(3, *size))},
        **fields,
    )


def features(**changes):
    return {
        "observation.state": vector(4),
        "action": vector(4),
        CAMERA: picture(),
        **{key.replace("_", "."): value for key, value in changes.items()},
    }


def line(check, *args) -> str:
    with pytest.raises(UserError) as raised:
        check("data set me/x", *args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_fits_passes():
    check_vectors("data set", features(), policy())
    check_pictures("data set", features(), policy())


def test_a_missing_action_is_named_with_what_there_is():
    have = {key: value for key, value in features().items() if key != "action"}
    assert "has no action, which the policy needs (it has observation.images.top, observation.state)" in line(
        check_vectors, have, policy()
    )


def test_a_policy_without_a_state_needs_none():
    have = {key: value for key, value in features().items() if key != "observation.state"}
    check_vectors("data set", have, policy(state=None))


def test_a_renamed_state_is_found():
    have = {"state": vector(4), "action": vector(4)}
    check_vectors("data set", have, policy(), {"state": "observation.state"})
    assert "has no observation.state" in line(check_vectors, have, policy())


@pytest.mark.parametrize("width", [1, 3, 5])
def test_another_width_is_named_by_feature_and_entries(width):
    names = [f"joint_{entry}" for entry in range(width)]
    have = features(action=vector(width, {"motors": names}))
    said = line(check_vectors, have, policy())
    assert f"action has {width} entries ({', '.join(names)}), the policy takes 4" in said


def test_a_base_policy_takes_narrower_robots_only():
    base = policy(state=32, action=32, max_state_dim=32, max_action_dim=32)
    check_vectors("data set", features(), base)
    assert "action has 33 entries" in line(check_vectors, features(action=vector(33)), base)


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_what_is_no_vector_is_refused(shape):
    have = features(action={"dtype": "float32", "shape": shape, "names": None})
    assert f"action has the shape {shape}" in line(check_vectors, have, policy())


@pytest.mark.parametrize(
    "resizes",
    [{"image_resolution": (64, 64)}, {"resize_imgs_with_padding": (64, 64)}, {"type": "act"}],
)
def test_a_policy_that_resizes_takes_any_size(resizes):
    check_pictures("data set", features() | {CAMERA: picture(480, 640)}, policy(**resizes))


@pytest.mark.parametrize("first", [False, True])
def test_another_size_is_refused_where_nothing_resizes(first):
    have = features() | {CAMERA: picture(480, 640, first=first)}
    said = line(check_pictures, have, policy(type="diffusion", resize_shape=None))
    assert "observation.images.top are 480×640 (height × width), the policy takes 64×64" in said


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_refused_everywhere(channels):
    have = features() | {CAMERA: picture(channels=channels)}
    said = line(check_pictures, have, policy(image_resolution=(64, 64)))
    assert f"observation.images.top have {channels} channel" in said
