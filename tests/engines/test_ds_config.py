import json
from copy import deepcopy
from pathlib import Path

import pytest

from craft_ds.engines.ds_config import read_ds_config, resolve_ds_config
from craft_ds.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
STAGE3 = {"zero_optimization": {"stage": 3}}


def resolve(config, **changes):
    given = {
        "path": "my.json",
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "grad_clip_norm": 0.5,
        "bf16": False,
        "world_size": 3,
    }
    return resolve_ds_config(config, **{**given, **changes})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_shipped_files_contradict_nothing(path, bf16):
    resolve(read_ds_config(path), bf16=bf16)


def test_the_trainer_accumulates_and_clips_itself():
    resolved = resolve(STAGE3)
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["train_batch_size"] == 4 * 3
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("bf16", [False, True])
def test_the_dtype_is_the_engines(bf16):
    assert resolve(STAGE3, bf16=bf16)["bf16"]["enabled"] is bf16
    assert resolve({**STAGE3, "bf16": {"enabled": "auto", "keep": 1}}, bf16=bf16)["bf16"] == {
        "enabled": bf16,
        "keep": 1,
    }


def test_values_equal_to_the_flags_are_welcome():
    resolve(
        {
            **STAGE3,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 24,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    )


def test_what_the_trainer_does_not_decide_is_kept_and_the_input_unchanged():
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}, "steps_per_print": 5, "x": [1]}
    before = deepcopy(config)
    resolved = resolve(config)
    assert config == before
    assert resolved["zero_optimization"] == before["zero_optimization"]
    assert resolved["steps_per_print"] == 5
    assert resolved["x"] == [1]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu=8", "--batch_size=4"]),
        (
            {"gradient_accumulation_steps": 1},
            ["gradient_accumulation_steps=1", "--gradient_accumulation_steps=2"],
        ),
        ({"train_batch_size": 12}, ["train_batch_size=12", "--batch_size=4", "3 ranks"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "--optimizer.grad_clip_norm=0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "--engine.dtype=float32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "--engine.dtype"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ['data_types.grad_accum_dtype="bf16"']),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "--optimizer.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "--scheduler.*"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage=2"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage=None"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            ["zero_optimization.offload_optimizer"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["zero_optimization.offload_param"],
        ),
        # Not the shape that DeepSpeed documents.
        ({"bf16": True}, ["bf16"]),
        ({"zero_optimization": 3}, ["zero_optimization"]),
    ],
)
def test_a_contradiction_names_both_sides(entries, names):
    with pytest.raises(UserError) as raised:
        resolve({**STAGE3, **entries})
    message = str(raised.value)
    assert "\n" not in message
    assert "--ds_config=my.json" in message
    assert all(name in message for name in names), message


def test_bf16_contradicts_in_the_other_direction_too():
    with pytest.raises(UserError, match=r"bf16.enabled=false.*--engine.dtype=bfloat16"):
        resolve({**STAGE3, "bf16": {"enabled": False}}, bf16=True)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not readable as JSON"), ("[1]", "JSON object"), ("{'a': 1}", "not readable")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, reason):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as raised:
        read_ds_config(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*ds_configs/"):
        read_ds_config(tmp_path / "none.json")


def test_a_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        read_ds_config(tmp_path)


def test_reading_gives_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(STAGE3))
    assert read_ds_config(path) == STAGE3
