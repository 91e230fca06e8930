"""Values of DeepSpeed's keys: a wrong one is one line that names file and key; an accepted one works."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.engines.deepspeed_config import read_ds_config, resolve_ds_config
from craft_ds.engines.deepspeed_keys import supported_keys
from craft_ds.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
# JSON has NaN and Infinity in Python's reading.
POOL = [
    *("", "5e8", "true", "fp16", "fp17", "cpu", "nvme", "auto ", "FP32", [], [1], {}, {"a": 1}),
    *(True, False, -1, 0, 1, 2, 1.5, -0.5, 5e8, 1e30, float("nan"), float("inf"), 1 << 70),
]


def resolve(config: dict, bf16: bool) -> dict:
    return resolve_ds_config(
        config,
        path="my.json",
        batch_size=1,
        gradient_accumulation_steps=1,
        grad_clip_norm=1.0,
        bf16=bf16,
        world_size=1,
    )


def keys(config: dict, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key, sections included."""
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys(value, (*before, key))


def changed(config: dict, path: tuple[str, ...], value: object) -> dict:
    result = deepcopy(config)
    node = result
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return result


def complaint(config: dict, bf16: bool) -> str | None:
    """Return the error, or None where DeepSpeed itself takes what is resolved."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        resolved = resolve(config, bf16)
    except UserError as error:
        return str(error)
    assert DeepSpeedConfig(resolved)
    return None


def is_right(old: object, value: object) -> bool | None:
    """Return whether a value is of the kind of a shipped one; None: the kind does not decide."""
    if isinstance(old, bool):
        return isinstance(value, bool)
    if isinstance(old, dict):
        return False if not isinstance(value, dict) else None
    if isinstance(old, int):
        whole = type(value) is int or (type(value) is float and value.is_integer())
        return None if whole and 0 <= value < 1 << 63 else False
    if old == "auto":
        return None
    return value == old or None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_wrong_value_of_a_shipped_file_is_named(path):
    config = read_ds_config(path)
    bf16 = config["bf16"]["enabled"] is True
    refused = 0
    for key in keys(config):
        old = config
        for part in key:
            old = old[part]
        for value in POOL:
            found = complaint(changed(config, key, value), bf16)
            # `--engine.dtype` decides which of the two is right.
            right = is_right(old, value) if key != ("bf16", "enabled") or value is True else None
            assert found is None or not right, (key, value, found)
            assert found or right is not False, (key, value)
            if found:
                refused += 1
                assert "\n" not in found
                assert found.startswith("--ds_config=my.json")
                assert ".".join(key) in found, (key, value, found)
    assert refused > 10 * len(list(keys(config)))


@pytest.mark.parametrize("stage", [2, 3])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_accepted_works_in_deepspeed_and_the_rest_is_one_line(stage, data):
    """Any value of any supported key: no traceback, here or there."""
    paths = [
        tuple(filter(None, (*section.split("."), key)))
        for section, known in supported_keys(stage).items()
        for key in known
        if (section, key) != ("zero_optimization", "stage")
    ]
    path = data.draw(st.sampled_from(paths))
    value = data.draw(
        st.sampled_from(POOL)
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.booleans()
        | st.none()
        | st.lists(st.integers(), max_size=2)
    )
    config = changed({"zero_optimization": {"stage": stage}}, path, value)
    found = complaint(config, bf16=data.draw(st.booleans()))
    if found is not None:
        assert "\n" not in found
        assert found.startswith("--ds_config=my.json")
        assert path[min(1, len(path) - 1)] in found


def test_gradients_are_summed_in_bf16_in_a_bf16_run_only():
    config = {"zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}
    assert resolve(config, bf16=True)["communication_data_type"] == "bf16"
    with pytest.raises(UserError, match=r'communication_data_type="bf16", but --engine.dtype=float'):
        resolve(config, bf16=False)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_keys_are_deepspeeds(stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    def names(model) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    known = supported_keys(stage)
    assert known["zero_optimization"].keys() <= names(DeepSpeedZeroConfig)
    offload = names(DeepSpeedZeroOffloadOptimizerConfig)
    assert known["zero_optimization.offload_optimizer"].keys() <= offload


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
            "reduce_bucket_size=0: it must be an int",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "5e8"}},
            'bucket_size="5e8": it must be',
        ),
        ({"communication_data_type": "fp17"}, 'communication_data_type="fp17": it must be "fp32" or "bf16"'),
        (
            {"communication_data_type": "fp16"},
            'communication_data_type="fp16": it must be "fp32" or "bf16" (in',
        ),
        ({"steps_per_print": "10"}, 'steps_per_print="10": it must be an integer of at least 1'),
        ({"steps_per_print": 0}, "steps_per_print=0: it must be an integer of at least 1"),
        ({"steps_per_prin": 5}, "steps_per_prin is not supported, did you mean steps_per_print?"),
        (
            {"reduce_bucket_size": 5},
            "not supported there, move it to zero_optimization",
        ),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "at stage 3, did you mean overlap_comm?"),
        ({"zero_optimization": {"stage": 3, "steps_per_print": 1}}, "there, move it to the top level"),
        ({"zero_optimization": {"stage": 3.0}}, "zero_optimization.stage=3.0: choose 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true: choose 2 or 3"),
        ({"comms_logger": True}, "comms_logger=true: it must be a JSON object"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1: it must be true or false"),
        (
            {"train_micro_batch_size_per_gpu": True},
            "per_gpu=true: it must be an integer",
        ),
    ],
)
def test_the_line_says_what_to_write(config, line):
    with pytest.raises(UserError) as raised:
        resolve({"zero_optimization": {"stage": 3}} | config, bf16=False)
    assert line in str(raised.value)


def test_whole_floats_are_integers():
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu", "buffer_count": 4.0},
    }
    resolved = resolve({"zero_optimization": zero}, bf16=False)["zero_optimization"]
    assert type(resolved["reduce_bucket_size"]) is int
    assert type(resolved["offload_optimizer"]["buffer_count"]) is int
    assert resolved["reduce_bucket_size"] == 500_000_000


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(UserError, match=r"twice.json: .*'stage' twice"):
        read_ds_config(path)


def test_a_file_is_read_as_json_reads_it(tmp_path):
    path = tmp_path / "nan.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": float("nan")}))
    with pytest.raises(UserError, match="gradient_clipping=NaN: it must be a number of at least 0"):
        resolve(read_ds_config(path), bf16=False)
