import pytest

from craft_ds.config.configs import EngineConfig, FsdpConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.errors import UserError

# The table of parameters in the guide.
GUIDE = {
    "enabled": False,
    "anchor_cache_dir": "",
    "anchor_batch_size": 16,
    "retention_freq": 5,
    "initial_lambda": 1.0,
    "lambda_lr": 0.01,
    "lambda_max": 10.0,
    "epsilon_start": 1.0,
    "epsilon_end": 0.1,
    "epsilon_decay_steps": 0,
    "use_grad_projection": True,
    "conflict_threshold": -0.1,
    "projection_mode": "weighted",
}


def craft(**changes) -> CraftConfig:
    return CraftConfig(**{"enabled": True, "anchor_cache_dir": "anchors", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        *({"merging": rule} for rule in ("pcgrad", "agem", "cagrad", "mgda", "upgrad")),
        {"merging": "cagrad", "cagrad_c": 0.9, "initial_lambda": 2.0},
        {"merging": "upgrad", "multiplier": "nupi", "nupi_nu": 0.9, "nupi_kp": 5.0, "nupi_ki": 0.5},
        {"multiplier": "fixed", "initial_lambda": 2.0},
        {"multiplier": "dynamic_barrier", "use_grad_projection": False, "barrier_beta": 2.0},
        {"surgery_scope": "layer", "merging": "cagrad"},
        *({"multiplier_scope": "task", "multiplier": rule} for rule in ("ascent", "nupi", "fixed")),
        {"multiplier_scope": "task", "merging": "pcgrad", "retention_scale": "freq"},
        {"retention_scale": "freq", "projection_mode": "task_priority"},
        {"retention_scale": "freq", "retention_freq": 1, "retention_freq_max": 8},
        {"retention_freq_max": 6},
    ],
)
def test_rules_are_valid_with_the_options_that_they_read(changes):
    craft(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"merging": "sum"}, ["--craft.merging=sum", "upgrad"]),
        ({"multiplier": "guess"}, ["--craft.multiplier=guess", "nupi"]),
        ({"merging": "agem", "multiplier": "nupi"}, ["--craft.multiplier=nupi", "--craft.merging=agem"]),
        ({"merging": "mgda", "initial_lambda": 2.0}, ["--craft.initial_lambda=2.0", "no λ"]),
        ({"merging": "agem", "lambda_max": 3.0}, ["--craft.lambda_max=3.0", "no λ"]),
        ({"merging": "pcgrad", "projection_mode": "equal"}, ["--craft.projection_mode=equal", "pcgrad"]),
        ({"merging": "upgrad", "use_grad_projection": False}, ["--craft.use_grad_projection", "upgrad"]),
        ({"cagrad_c": 0.9}, ["--craft.cagrad_c=0.9", "--craft.merging=guide"]),
        ({"nupi_kp": 2.0}, ["--craft.nupi_kp=2.0", "--craft.multiplier=ascent"]),
        ({"barrier_beta": 2.0}, ["--craft.barrier_beta=2.0", "--craft.multiplier=ascent"]),
        ({"multiplier": "fixed", "lambda_lr": 0.1}, ["--craft.lambda_lr=0.1", "--craft.multiplier=fixed"]),
        (
            {"multiplier": "dynamic_barrier", "use_grad_projection": False, "initial_lambda": 2.0},
            ["--craft.initial_lambda=2.0", "dynamic_barrier"],
        ),
        ({"multiplier": "dynamic_barrier"}, ["--craft.use_grad_projection=false"]),
        ({"merging": "upgrad", "multiplier": "dynamic_barrier"}, ["--craft.multiplier=dynamic_barrier"]),
        ({"merging": "cagrad", "cagrad_c": -0.1}, ["--craft.cagrad_c=-0.1"]),
        ({"merging": "cagrad", "cagrad_c": float("nan")}, ["--craft.cagrad_c=nan"]),
        ({"multiplier": "nupi", "nupi_nu": 1.0}, ["--craft.nupi_nu=1.0", "(-1, 1)"]),
        ({"multiplier": "nupi", "nupi_kp": 0.0, "nupi_ki": 0.0}, ["--craft.multiplier=fixed"]),
        ({"multiplier": "nupi", "nupi_kp": -1.0}, ["--craft.nupi_kp=-1.0"]),
        ({"constraint_freq": 0}, ["--craft.constraint_freq=0", "at least 1"]),
        (
            {"constraint_freq": 2, "constraint_split": "train"},
            ["--craft.constraint_freq=2", "--craft.constraint_split=train"],
        ),
        (
            {"constraint_freq": 2, "multiplier": "dynamic_barrier", "use_grad_projection": False},
            ["--craft.multiplier=dynamic_barrier", "--craft.constraint_freq=1"],
        ),
        ({"surgery_scope": "block"}, ["--craft.surgery_scope=block", "layer"]),
        ({"multiplier_scope": "layer"}, ["--craft.multiplier_scope=layer", "task"]),
        ({"retention_scale": "k"}, ["--craft.retention_scale=k", "freq"]),
        (
            {"surgery_scope": "layer", "use_grad_projection": False},
            ["--craft.surgery_scope=layer", "--craft.use_grad_projection=false"],
        ),
        (
            {"surgery_scope": "layer", "use_grad_projection": False, "multiplier": "dynamic_barrier"},
            ["--craft.surgery_scope=layer"],
        ),
        *(
            ({flag: value, "merging": rule}, [f"--craft.{flag}={value}", f"--craft.merging={rule}", "upgrad"])
            for flag, value in (("multiplier_scope", "task"), ("retention_scale", "freq"))
            for rule in ("agem", "mgda", "cagrad")
        ),
        (
            {"multiplier_scope": "task", "projection_mode": "task_priority"},
            ["--craft.multiplier_scope=task", "--craft.projection_mode=task_priority", "use weighted"],
        ),
        ({"retention_scale": "freq", "projection_mode": "equal"}, ["--craft.projection_mode=equal"]),
        (
            {"multiplier_scope": "task", "multiplier": "dynamic_barrier", "use_grad_projection": False},
            ["--craft.multiplier=dynamic_barrier", "--craft.multiplier_scope=global"],
        ),
        (
            {"retention_scale": "freq", "retention_freq": 1},
            ["--craft.retention_scale=freq", "retention_freq=1"],
        ),
        *(
            (
                {"retention_freq_max": value},
                [f"--craft.retention_freq_max={value}", "--craft.retention_freq=5"],
            )
            for value in (-1, 3, 5)
        ),
    ],
)
def test_rules_refuse_options_without_an_effect(changes, named):
    with pytest.raises(UserError) as error:
        craft(**changes).validate()
    assert all(part in str(error.value) for part in named), str(error.value)


def test_defaults_are_the_guides():
    config = CraftConfig()
    assert {name: getattr(config, name) for name in GUIDE} == GUIDE


@pytest.mark.parametrize("mode", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("split", ["heldout", "train"])
def test_every_choice_is_valid(mode, schedule, split):
    craft(projection_mode=mode, epsilon_schedule=schedule, constraint_split=split).validate()


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon_start": 0.1},
        {"epsilon_start": 0.0, "epsilon_end": 0.0},
        {"initial_lambda": 10.0},
        {"lambda_lr": 0.0},
        {"conflict_threshold": -1.0},
        {"conflict_threshold": 1.0},
        {"retention_freq": 1, "anchor_batch_size": 1},
    ],
)
def test_bounds_are_valid(changes):
    craft(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"anchor_cache_dir": ""}, ["--craft.anchor_cache_dir", "craft-ds anchors"]),
        ({"anchor_batch_size": 0}, ["--craft.anchor_batch_size=0"]),
        ({"retention_freq": 0}, ["--craft.retention_freq=0"]),
        ({"retention_freq": -5}, ["--craft.retention_freq=-5"]),
        ({"initial_lambda": -1.0}, ["--craft.initial_lambda=-1.0"]),
        ({"initial_lambda": 11.0}, ["--craft.initial_lambda=11.0", "--craft.lambda_max=10.0"]),
        ({"lambda_lr": -0.1}, ["--craft.lambda_lr=-0.1"]),
        ({"lambda_lr": float("nan")}, ["--craft.lambda_lr=nan"]),
        ({"lambda_max": -1.0}, ["--craft.lambda_max=-1.0"]),
        ({"epsilon_start": 0.05}, ["--craft.epsilon_start=0.05", "--craft.epsilon_end=0.1"]),
        ({"epsilon_start": float("nan")}, ["--craft.epsilon_start=nan"]),
        ({"epsilon_end": -0.1}, ["--craft.epsilon_end=-0.1"]),
        ({"epsilon_decay_steps": -1}, ["--craft.epsilon_decay_steps=-1"]),
        ({"conflict_threshold": -1.1}, ["--craft.conflict_threshold=-1.1"]),
        ({"conflict_threshold": float("nan")}, ["--craft.conflict_threshold=nan"]),
        ({"projection_mode": "sum"}, ["--craft.projection_mode=sum", "task_priority"]),
        ({"epsilon_schedule": "step"}, ["--craft.epsilon_schedule=step", "cosine"]),
        ({"constraint_split": "test"}, ["--craft.constraint_split=test", "heldout"]),
        ({"epsilon_schedule": "exponential", "epsilon_end": 0.0}, ["--craft.epsilon_end"]),
    ],
)
def test_a_bad_value_is_named(changes, names):
    with pytest.raises(UserError) as raised:
        craft(**changes).validate()
    message = str(raised.value)
    assert "\n" not in message
    assert all(name in message for name in names), message
    # The baseline uses none of these.
    CraftConfig(**{**changes, "enabled": False}).validate()


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, "single"),
        ({"ds_config": "zero3.json"}, "zero"),
        ({"name": "zero", "ds_config": "zero3.json"}, "zero"),
        ({"name": "single"}, "single"),
        ({"name": "fsdp"}, "fsdp"),
        ({"name": "fsdp", "fsdp": FsdpConfig(dp_replicate=2)}, "fsdp"),
    ],
)
def test_engine_auto_is_resolved(given, resolved):
    engine = EngineConfig(**given)
    engine.resolve()
    assert engine.name == resolved
    engine.resolve()
    assert engine.name == resolved


def test_several_processes_without_a_ds_config_mean_fsdp(set_launch):
    set_launch(0, 2)
    engine = EngineConfig()
    engine.resolve()
    assert engine.name == "fsdp"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"name": "ddp"}, ["--engine=ddp", "auto, single, zero, fsdp"]),
        ({"name": "fsdp", "ds_config": "a.json"}, ["--ds_config=a.json", "--engine=fsdp"]),
        ({"fsdp": FsdpConfig(dp_replicate=2)}, ["--engine.fsdp", "--engine=single"]),
        ({"name": "fsdp", "fsdp": FsdpConfig(dp_replicate=0)}, ["--engine.fsdp.dp_replicate=0"]),
        ({"name": "fsdp", "fsdp": FsdpConfig(dp_shard=0)}, ["--engine.fsdp.dp_shard=0", "-1"]),
        ({"name": "fsdp", "fsdp": FsdpConfig(reduce_dtype="fp16")}, ["--engine.fsdp.reduce_dtype=fp16"]),
        ({"name": "fsdp", "fsdp": FsdpConfig(param_dtype="fp16")}, ["--engine.fsdp.param_dtype=fp16"]),
        ({"name": "zero"}, ["--engine=zero", "--ds_config"]),
        ({"name": "single", "ds_config": "a.json"}, ["--ds_config=a.json", "--engine=single"]),
        ({"dtype": "float16"}, ["--engine.dtype=float16", "bfloat16"]),
    ],
)
def test_contradicting_engine_flags_are_named(given, names):
    with pytest.raises(UserError) as raised:
        EngineConfig(**given).resolve()
    assert all(name in str(raised.value) for name in names), raised.value
