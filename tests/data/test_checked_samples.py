"""Samples that are checked as they are read: each fault is named by data set, episode and frame."""

import errno
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from craft_ds.data.checked_samples import BadSample, NamedSamples, image_shape, sample_loader
from craft_ds.data.value_limits import value_limits
from craft_ds.testing.damaged_samples import DAMAGES, damage, open_test_dataset
from craft_ds.testing.datasets import make_test_dataset


@pytest.fixture
def root(tmp_path):
    return make_test_dataset(tmp_path / "data", tasks=2, episodes_per_task=1, frames=12)


@pytest.fixture(params=[0, 2], ids=["no workers", "2 workers"])
def workers(request):
    return {"num_workers": 2, "multiprocessing_context": "fork"} if request.param else {}


def checked(root, *, chunk: int = 3) -> NamedSamples:
    dataset = open_test_dataset(root, chunk)
    return NamedSamples(dataset, value_limits(dataset, 20))


def fault(samples: NamedSamples, index: int) -> BadSample | None:
    """The error of a sample; None: it is good."""
    try:
        samples[index]
    except BadSample as error:
        return error
    return None


def faults(samples: NamedSamples) -> dict[tuple[int, int], str]:
    """Reason of every bad sample, by episode and frame."""
    found = [error for index in range(len(samples)) if (error := fault(samples, index))]
    for error in found:
        place = f"data set craft-ds/test, episode {error.episode}, frame {error.frame}: "
        assert str(error) == place + error.reason
        assert "\n" not in str(error)
    return {(error.episode, error.frame): error.reason for error in found}


def test_good_samples_are_the_data_sets(root):
    samples = checked(root)
    assert faults(samples) == {}
    assert len(samples) == 24
    for index in (0, 11, 12, 23):
        for key, value in samples.dataset[index].items():
            found = samples[index][key]
            assert torch.equal(found, value) if torch.is_tensor(value) else found == value


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("place", [(0, 0), (0, 11), (1, 5)])
def test_a_fault_is_named_with_its_episode_and_frame(root, name, place):
    damage(root, name, *place)
    found = faults(checked(root, chunk=1))
    assert list(found) == [place]
    assert DAMAGES[name].reason in found[place]


@pytest.mark.parametrize("name", ["nan action", "far action", "cut picture"])
def test_a_fault_within_the_chunk_is_named_by_its_own_frame(root, name):
    damage(root, name, 1, 5)
    samples = checked(root)
    seen = {index: error for index in range(24) if (error := fault(samples, index))}
    assert list(seen) == [15, 16, 17]
    assert {(error.episode, error.frame) for error in seen.values()} == {(1, 5)}
    assert "the sample of frame 3 includes it" in seen[15].reason
    assert "the sample of frame" not in seen[17].reason


def test_the_loader_raises_the_one_line(root, workers):
    damage(root, "cut picture", 0, 7)
    batches = sample_loader(checked(root), [[0, 1], [6, 7], [8, 9]], **workers)
    assert next(batches)["frame_index"].tolist() == [0, 1]
    with pytest.raises(BadSample, match=r"^data set craft-ds/test, episode 0, frame 7: ") as raised:
        next(batches)
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()  # although the traceback is kept


def test_the_loader_gives_all_good_batches(root, workers):
    batches = sample_loader(checked(root), [[0, 1], [6], [8, 9, 10]], **workers)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [6], [8, 9, 10]]


def test_an_error_pickles_with_its_place():
    copy = pickle.loads(pickle.dumps(BadSample("me/press", 3, 4, "it is nan")))
    assert (copy.dataset, copy.episode, copy.frame, copy.reason) == ("me/press", 3, 4, "it is nan")
    assert str(copy) == "data set me/press, episode 3, frame 4: it is nan"


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_failure_of_the_machine_is_not_the_samples(root, monkeypatch, code):
    samples = checked(root)

    def fail(*_: object) -> None:
        raise OSError(code, "failed")

    monkeypatch.setattr(type(samples.dataset), "__getitem__", fail)
    with pytest.raises(OSError, match="failed"):
        samples[0]


def test_a_file_that_disappeared_is_named(root, monkeypatch):
    samples = checked(root)

    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "videos/file-000.mp4")

    monkeypatch.setattr(type(samples.dataset), "__getitem__", fail)
    with pytest.raises(BadSample, match=r"episode 1, frame 1: videos/file-000.mp4 is missing$"):
        samples[13]


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_vectors_of_one_entry_keep_their_axis(tmp_path, chunk):
    root = make_test_dataset(
        tmp_path / "one", tasks=1, episodes_per_task=1, frames=5, state_dim=1, action_dim=1
    )
    sample = checked(root, chunk=chunk)[2]
    assert sample["observation.state"].shape == (1,)
    assert sample["action"].shape == ((chunk, 1) if chunk else (1,))


def test_vectors_that_the_policy_does_not_use_may_hold_anything(root):
    damage(root, "nan state", 0, 3)
    dataset = open_test_dataset(root, 1)
    assert list(faults(NamedSamples(dataset))) == [(0, 3)]
    assert faults(NamedSamples(dataset, value_limits(dataset, 20, ["action"]), ["action"])) == {}


def test_image_transforms_may_resize(root):
    damage(root, "small picture", 0, 3)
    dataset = open_test_dataset(root, 1)
    dataset.reader.set_image_transforms(v2.RandomCrop(20))
    dataset.image_transforms = v2.RandomCrop(20)
    assert NamedSamples(dataset)[5]["observation.images.top"].shape == (3, 20, 20)
    dataset.image_transforms = v2.Resize((30, 30))
    assert "a picture of 20×20×3" in fault(NamedSamples(dataset), 5).reason


@pytest.mark.parametrize(
    ("shape", "names"),
    [((48, 96, 3), ["height", "width", "channels"]), ((3, 48, 96), ["channels", "height", "width"])],
)
def test_the_order_of_a_pictures_axes_is_that_of_its_names(shape, names):
    assert image_shape({"shape": shape, "names": names}) == (3, 48, 96)
    assert image_shape({"shape": shape, "names": None}) == (3, 48, 96)


# --- the limits -------------------------------------------------------------------------------------------


def of_values(root, values: np.ndarray, factor: float = 20.0):
    """Limits of a data set whose states are these."""
    from craft_ds.testing.damaged_samples import rewrite_column

    rewrite_column(root, "observation.state", list(values.astype(np.float32)))
    return value_limits(open_test_dataset(root, 1), factor)


def test_a_rare_move_is_no_fault_but_a_glitch_is(root):
    """A gripper that opens in one frame of 24 moves as far as the joints do; a glitch does not."""
    values = np.random.default_rng(0).uniform(-1, 1, size=(24, 4))
    values[:, 3] = 0
    values[7, 3] = 1
    limits = of_values(root, values)
    assert limits.contain("observation.state", torch.tensor([1.0, -1, 0, 1])).all()
    assert limits.contain("observation.state", torch.tensor([0, 0, 0, 100.0])).tolist() == [True] * 3 + [
        False
    ]


def test_a_glitch_does_not_widen_its_own_limits(root):
    values = np.random.default_rng(0).uniform(-1, 1, size=(24, 4))
    values[7, 2] = 1e9
    limits = of_values(root, values)
    assert not limits.contain("observation.state", torch.tensor([0, 0, 1e9, 0]))[2]
    assert limits.describe("observation.state", 0).startswith("the usual -")


def test_a_state_that_never_moves_has_no_limit(root):
    limits = of_values(root, np.full((24, 4), 2.0))
    assert limits.contain("observation.state", torch.tensor([2.0, 2.0, 1e6, 2.0])).all()


def test_factor_zero_means_no_limits(root):
    assert value_limits(open_test_dataset(root, 1), 0) == {}
