import json
from copy import deepcopy
from pathlib import Path

import pytest

from craft_ds.engines.deepspeed_config import check_step_size, read_ds_config, resolve_ds_config
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


def test_the_project_ships_what_its_readme_describes():
    readme = (SHIPPED[0].parent / "README.md").read_text()
    assert [path.name for path in SHIPPED] == [
        "zero2.json",
        "zero3.json",
        "zero3_bf16.json",
        "zero3_lora.json",
        "zero3_offload.json",
    ]
    assert all(f"`{path.name}`" in readme for path in SHIPPED)
    for path in SHIPPED:
        config = read_ds_config(path)
        for key in (*config, *config["zero_optimization"]):
            assert f"`{key}`" in readme, f"{path.name}: {key}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_shipped_files_contradict_nothing(path, bf16):
    if path.stem in ("zero3_bf16", "zero3_lora") and not bf16:
        with pytest.raises(UserError, match=r"zero3_.*bf16.enabled=true, but --engine.dtype=float32"):
            resolve(read_ds_config(path), path=str(path), bf16=bf16)
    else:
        resolve(read_ds_config(path), bf16=bf16)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_takes_what_is_resolved(path, bf16):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = read_ds_config(path)
    config.pop("bf16")
    taken = DeepSpeedConfig(resolve(config, bf16=bf16, world_size=1))
    assert taken.bfloat16_config.enabled is bf16
    assert taken.gradient_clipping == 0.0
    assert taken.grad_accum_dtype == "fp32"


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
    assert resolve({**STAGE3, "bf16": {"enabled": "auto", "check_grad_overflow": False}}, bf16=bf16)[
        "bf16"
    ] == {
        "enabled": bf16,
        "check_grad_overflow": False,
    }


def test_values_equal_to_the_flags_are_welcome():
    resolve(
        {
            **STAGE3,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    )


def test_other_keys_are_kept_and_the_input_is_not_changed():
    config = {
        "zero_optimization": {"stage": 3, "sub_group_size": 9, "reduce_bucket_size": 7},
        "steps_per_print": 5,
        "comms_logger": {"enabled": True},
    }
    before = deepcopy(config)
    resolved = resolve(config)
    assert config == before
    assert {key: resolved[key] for key in config} == before


def test_any_other_auto_means_the_default():
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
    }
    resolved = resolve({"zero_optimization": zero, "communication_data_type": "auto"})
    assert resolved["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "reduce_bucket_size" not in resolved["zero_optimization"]
    assert "communication_data_type" not in resolved


def test_deepspeed_measures_no_gradient_that_the_step_has_measured():
    def norm(zero: dict) -> bool | None:
        return resolve({"zero_optimization": zero})["zero_optimization"].get("compute_grad_norm")

    assert norm({"stage": 2}) is False
    # DeepSpeed has no such option for these.
    assert norm({"stage": 3}) is None
    assert norm({"stage": 2, "offload_optimizer": {"device": "cpu"}}) is None

    assert resolve(STAGE3)["bf16"]["check_grad_overflow"] is False
    assert resolve(STAGE3 | {"bf16": {"check_grad_overflow": True}})["bf16"]["check_grad_overflow"] is True


def test_sub_groups_are_small_unless_the_file_says_otherwise():
    assert resolve(STAGE3)["zero_optimization"]["sub_group_size"] == 100_000_000
    sized = {"stage": 3, "sub_group_size": 5}
    assert resolve({"zero_optimization": sized})["zero_optimization"]["sub_group_size"] == 5
    assert "sub_group_size" not in resolve({"zero_optimization": {"stage": 2}})["zero_optimization"]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_is_deepspeeds_by_default(stage):
    offloaded = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    key = "zero_force_ds_cpu_optimizer"
    assert resolve({"zero_optimization": offloaded})[key] is True
    assert resolve({"zero_optimization": offloaded, key: "auto"})[key] is True
    assert resolve({"zero_optimization": offloaded, key: False})[key] is False
    assert resolve({"zero_optimization": {"stage": stage}, key: True})[key] is False
    for nothing in ({"device": "none"}, None):
        assert resolve({"zero_optimization": {"stage": stage, "offload_optimizer": nothing}})[key] is False


@pytest.mark.parametrize("stage", [2, 3])
def test_small_moments_are_not_deepspeeds(stage):
    offloaded = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    key = "zero_force_ds_cpu_optimizer"
    for given in ({}, {key: "auto"}, {key: False}):
        assert resolve({"zero_optimization": offloaded, **given}, optimizer_state="int8")[key] is False
    with pytest.raises(UserError, match=rf"{key}=true, but --engine.optimizer_state=int8 means false"):
        resolve({"zero_optimization": offloaded, key: True}, optimizer_state="int8")


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu=8", "--batch_size=4"]),
        (
            {"gradient_accumulation_steps": 1},
            ["gradient_accumulation_steps=1", "--gradient_accumulation_steps=2"],
        ),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "--optimizer.grad_clip_norm=0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "--engine.dtype=float32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "--engine.dtype"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ['data_types.grad_accum_dtype="bf16"']),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "--optimizer.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "--scheduler.*"]),
        ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage=1", "choose 2 or 3", "stage 2 also"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage=0", "choose 2 or 3"]),
        ({"zero_optimization": {"stage": [3]}}, ["zero_optimization.stage=[3]"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage=null"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ['offload_optimizer.device="nvme"', '"cpu" or "none"'],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ["zero_optimization.offload_optimizer.ratio is not supported"],
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size"]),
        (
            {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 2}},
            ["stage3_prefetch_bucket_size is not supported at stage 2"],
        ),
        ({"zero_optimization": {"stage": 3, "round_robin_gradients": True}}, ["round_robin_gradients"]),
        ({"bf16": {"enabled": False, "bf16_optimizer_states": True}}, ["bf16.bf16_optimizer_states"]),
        ({"data_types": {"param_dtype": "bf16"}}, ["data_types.param_dtype"]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation is not supported"]),
        ({"zero_optimisation": {}}, ["zero_optimisation is not supported"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["zero_optimization.offload_param"],
        ),
        # Not the shape that DeepSpeed documents.
        ({"bf16": True}, ["bf16"]),
        ({"zero_optimization": 3}, ["zero_optimization"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": True}},
            ["offload_optimizer=true: it must be a JSON object"],
        ),
    ],
)
def test_a_contradiction_names_both_sides(entries, names):
    with pytest.raises(UserError) as raised:
        resolve({**STAGE3, **entries})
    message = str(raised.value)
    assert "\n" not in message
    assert "--ds_config=my.json" in message
    assert all(name in message for name in names), message


@pytest.mark.parametrize("said", [{}, {"train_batch_size": "auto"}, {"train_batch_size": 24}])
def test_a_file_may_say_what_a_step_takes(said):
    check_step_size({**STAGE3, **said}, path="my.json", samples_per_step=24, flags="--batch_size=4")


def test_a_file_that_wants_another_step_is_refused():
    with pytest.raises(UserError, match=r"my.json says train_batch_size=12, but --batch_size=4 means 24: "):
        check_step_size({"train_batch_size": 12}, path="my.json", samples_per_step=24, flags="--batch_size=4")


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
    with pytest.raises(UserError, match=r"no such file.*zero3, zero3_bf16"):
        read_ds_config(tmp_path / "none.json")


def test_a_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        read_ds_config(tmp_path)


def test_reading_gives_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(STAGE3))
    assert read_ds_config(path) == STAGE3
