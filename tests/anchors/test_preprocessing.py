"""Two preprocessors are equal where they give the same tokens, and a difference is named."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from builds import edit_processor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline
from safetensors.torch import load_file, save_file

from craft_ds.anchors.preprocessing import STATISTICS, describe_preprocessor, first_difference
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors

NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"
KINDS = {"observation.state": FeatureType.STATE, "action": FeatureType.ACTION}


def preprocessor(mode, state, action, eps=1e-8):
    """A preprocessor that only normalises; statistics are (low, high) pairs of lists."""
    names = STATISTICS[mode]
    step = NormalizerProcessorStep(
        features={key: PolicyFeature(kind, (len(state[0]),)) for key, kind in KINDS.items()},
        norm_map={kind: NormalizationMode(mode) for kind in KINDS.values()},
        stats={
            key: {name: np.array(values, np.float32) for name, values in zip(names, pair, strict=True)}
            for key, pair in (("observation.state", state), ("action", action))
        },
        eps=eps,
    )
    return PolicyProcessorPipeline(steps=[step])


def normalised(pipeline, key, values):
    batch = {"observation.state": values, "action": values}
    return pipeline(batch)[key]


def difference(one, other):
    return first_difference(describe_preprocessor(one), describe_preprocessor(other))


numbers = st.floats(-100, 100, width=32)
pairs = st.lists(st.tuples(numbers, st.floats(0.125, 50, width=32)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(STATISTICS)),
    pairs,
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 3),
    st.sampled_from([0, 1]),
    st.one_of(st.floats(-0.9, 2), st.floats(-1e-7, 1e-7)),
)
def test_a_statistic_counts_where_values_differ(mode, given_pairs, key, dimension, which, change):
    """`change` is in units of the dimension's width: the oracle is LeRobot's own normaliser."""
    low = [a for a, _ in given_pairs]
    high = [b if mode == "MEAN_STD" else a + b for a, b in given_pairs]
    dimension %= len(low)
    width = given_pairs[dimension][1]
    pair = [list(low), list(high)]
    pair[which][dimension] += change * width * (1 if which else -1)  # never inverts the range
    one = preprocessor(mode, (low, high), (low, high))
    statistics = {name: (low, high) for name in KINDS} | {key: pair}
    other = preprocessor(mode, statistics["observation.state"], statistics["action"])
    values = torch.tensor([low, [a + b for a, b in given_pairs]], dtype=torch.float32)
    moved = (normalised(one, key, values) - normalised(other, key, values)).abs().max()
    assume(not 2e-6 < moved < 1e-3)  # too close to the tolerance, in fp32
    found = difference(one, other)
    if moved >= 1e-3:
        assert found is not None
        assert found.what == f"{STATISTICS[mode][which]} of {key}[{dimension}]"
    else:
        # In fp32 a large offset swallows a small difference, and so do the values.
        assert found is None


@pytest.mark.parametrize("mode", ["MIN_MAX", "QUANTILES", "QUANTILE10"])
def test_a_dimension_that_never_moved_must_be_equal(mode):
    one = preprocessor(mode, ([0.5, 0], [0.5, 1]), ([0.5, 0], [0.5, 1]))
    other = preprocessor(mode, ([0.500001, 0], [0.500001, 1]), ([0.5, 0], [0.5, 1]))
    assert difference(one, other).what == f"{STATISTICS[mode][0]} of observation.state[0]"


def test_eps_counts_where_it_divides():
    still, moving = ([0.5, 0], [0.5, 1]), ([0, 0], [1, 1])
    eps = {"eps": 1e-3}

    def make(mode, state, **options):
        return preprocessor(mode, state, moving, **options)

    assert difference(make("MIN_MAX", moving), make("MIN_MAX", moving, **eps)) is None
    found = difference(make("MIN_MAX", still), make("MIN_MAX", still, **eps))
    assert found == ("eps of the normalisation of observation.state", 1e-8, 1e-3)
    found = difference(make("MEAN_STD", moving), make("MEAN_STD", moving, **eps))
    assert found.what.startswith("eps")


def test_dimensions_and_modes():
    one = preprocessor("MIN_MAX", ([0, 0], [1, 1]), ([0, 0], [1, 1]))
    three = ([0, 0, 0], [1, 1, 1])
    assert difference(one, preprocessor("MIN_MAX", three, three)) == ("number of dimensions of action", 2, 3)
    other = preprocessor("QUANTILES", ([0, 0], [1, 1]), ([0, 0], [1, 1]))
    assert difference(one, other) == ("normalisation of action", "MIN_MAX", "QUANTILES")


def test_incomplete_and_non_finite_statistics():
    pipeline = preprocessor("MIN_MAX", ([0, 0], [1, 1]), ([0, float("nan")], [1, 1]))
    with pytest.raises(UserError, match="action by MIN_MAX, but its statistic min is missing or non-finite"):
        describe_preprocessor(pipeline)
    pipeline.steps[0].norm_map[FeatureType.STATE] = NormalizationMode.MEAN_STD
    with pytest.raises(UserError, match=r"observation\.state by MEAN_STD, but its statistic mean is missing"):
        describe_preprocessor(pipeline)


# --- saved processors -------------------------------------------------------------------------------------


@pytest.fixture
def other(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "other")


def load(directory):
    return load_processors(load_policy_config(directory), directory)[0]


def scale(directory, key, factor, only=None):
    tensors = load_file(directory / NORMALIZER)
    tensors[key][only] *= factor
    save_file(tensors, directory / NORMALIZER)


def reverse_keys(value):
    if isinstance(value, dict):
        return {key: reverse_keys(value[key]) for key in reversed(value)}
    return [reverse_keys(entry) for entry in value] if isinstance(value, list) else value


IRRELEVANT = {
    "nothing": lambda steps: None,
    "names in the data set": lambda steps: steps["rename_observations_processor"].update(
        rename_map={"observation.images.front": "observation.images.top"}
    ),
    "joints that stay absolute while nothing is relative": lambda steps: steps[
        "relative_actions_processor"
    ].update(exclude_joints=["wrist"], action_names=["wrist"]),
    "device": lambda steps: steps["device_processor"].update(device="cuda"),
    "tokenizer folder": lambda steps: steps["tokenizer_processor"].update(tokenizer_name="elsewhere"),
    "eps where everything moves": lambda steps: steps["normalizer_processor"].update(eps=1e-9),
    "a camera that is not normalised": lambda steps: steps["normalizer_processor"]["features"].pop(
        "observation.images.side1"
    ),
}


@pytest.mark.parametrize("change", IRRELEVANT.values(), ids=IRRELEVANT)
def test_what_decides_no_token_is_no_difference(teacher, other, change):
    edit_processor(other, change)
    file = other / "policy_preprocessor.json"
    file.write_text(json.dumps(reverse_keys(json.loads(file.read_text()))))
    assert difference(load(teacher), load(other)) is None


def test_unused_statistics_are_no_difference(teacher, other):
    tensors = load_file(other / NORMALIZER)
    save_file({**tensors, "action.mean": torch.ones(4), "timestamp.max": torch.ones(1)}, other / NORMALIZER)
    assert difference(load(teacher), load(other)) is None


RELEVANT = {
    "max_length of processor step TokenizerProcessorStep": lambda steps: steps["tokenizer_processor"].update(
        max_length=32
    ),
    "padding_side of processor step TokenizerProcessorStep": lambda steps: steps[
        "tokenizer_processor"
    ].update(padding_side="left"),
    "max_action_tokens of processor step action_tokenizer": lambda steps: steps[
        "craft_action_tokenizer_processor"
    ].update(max_action_tokens=12),
    "processor steps": lambda steps: steps["relative_actions_processor"].update(enabled=True),
    "normalisation of action": lambda steps: steps["normalizer_processor"]["norm_map"].update(
        ACTION="IDENTITY"
    ),
    "normalisation of observation.state": lambda steps: steps["normalizer_processor"]["features"].pop(
        "observation.state"
    ),
}


@pytest.mark.parametrize(("what", "change"), RELEVANT.items(), ids=RELEVANT)
def test_what_decides_tokens_is_named(teacher, other, what, change):
    edit_processor(other, change)
    one, two = load(teacher), load(other)
    assert difference(one, two).what == what
    assert difference(two, one).what == what


def test_an_offset_of_action_tokens_is_named(teacher):
    one = load(teacher)
    two = copy.copy(one)
    two.steps = [copy.copy(step) for step in one.steps]
    (tokenizer,) = (step for step in two.steps if hasattr(step, "fast_skip_tokens"))
    tokenizer.fast_skip_tokens = 128
    assert difference(one, two) == ("fast_skip_tokens of processor step action_tokenizer", 0, 128)


def test_images_that_are_normalised_are_named(teacher, other):
    edit_processor(other, lambda steps: steps["normalizer_processor"]["norm_map"].update(VISUAL="MEAN_STD"))
    assert difference(load(teacher), load(other)) is None  # there are no statistics: nothing happens
    tensors = load_file(other / NORMALIZER)
    tensors |= {f"observation.images.top.{name}": torch.ones(3, 1, 1) for name in ("mean", "std")}
    save_file(tensors, other / NORMALIZER)
    found = difference(load(teacher), load(other))
    assert found == ("normalisation of observation.images.top", "none", "MEAN_STD")


def test_the_statistic_and_its_dimension_are_named(teacher, other):
    scale(other, "action.max", 3, only=2)
    recorded = describe_preprocessor(load(teacher))
    assert json.loads(json.dumps(recorded)) == recorded
    names = {"action": ["shoulder", "elbow", "wrist", "gripper"]}
    found = first_difference(recorded, describe_preprocessor(load(other)), names)
    assert found == ("max of action[2] (wrist)", "3", "9")
