"""Forged checkpoints with matching checksums: a change of meaning is refused in one line.

A swap of two tensors of the same shape, and other plausible values, cannot be told from a training run.
A resumed run does not use the names of tokenizers in config.json and the dropout of adapters: it is the same.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from file_damage import refused, seal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from craft_ds.config.parser import parse_arguments
from craft_ds.export.export import export_checkpoint
from craft_ds.training.trainer import train_craft

LAYOUTS = ("full", "pieces", "adapters")
WEIGHTS = {
    "full": "model.safetensors",
    "pieces": "model.rank_00000.safetensors",
    "adapters": "adapter_model.safetensors",
}
OPTIMIZER = {
    "full": "optimizer.safetensors",
    "pieces": "optimizer.rank_00000.safetensors",
    "adapters": "optimizer.safetensors",
}


class Forgery(NamedTuple):
    """A change to a checkpoint of a layout."""

    name: str
    layout: str
    change: Callable[[Path], None]


@pytest.fixture(scope="module")
def originals(inputs, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each layout after the first of two steps."""
    root = tmp_path_factory.mktemp("originals")
    special = {"full": [], "pieces": ["--checkpoint.layout=per_rank"], "adapters": ["--lora=attention_mlp"]}
    for layout in LAYOUTS:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sys.argv", ["train_craft.py"])
            flags = [*inputs.flags(root / layout), *inputs.craft_flags(), "--steps=2", "--save_freq=1"]
            train_craft(parse_arguments([*flags, *special[layout]]))
    return {layout: root / layout / "step_000001" for layout in LAYOUTS}


# --- tensors ----------------------------------------------------------------------------------------------


def in_tensors(file: str, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], None]):
    def change(checkpoint: Path) -> None:
        path = checkpoint / file
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        edit(tensors, metadata)
        save_file(tensors, path, metadata)

    return change


def largest(tensors: dict[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: (tensors[name].numel(), name))


def drop(tensors, _):
    del tensors[largest(tensors)]


def add(tensors, metadata):
    tensors["evil.weight"] = torch.ones(3)
    if "parts" in metadata:
        metadata["parts"] = json.dumps(json.loads(metadata["parts"]) | {"evil.weight": [0, [3]]})


def rename(tensors, metadata):
    name = largest(tensors)
    tensors["evil." + name] = tensors.pop(name)
    metadata["parts"] = metadata.get("parts", "").replace(f'"{name}"', f'"evil.{name}"')


def shorten(tensors, _):
    name = largest(tensors)
    tensors[name] = tensors[name].flatten()[:-1].clone()


def other_shape(tensors, metadata):
    name = largest(tensors)
    if "parts" not in metadata:
        tensors[name] = tensors[name].unsqueeze(0)
        return
    parts = json.loads(metadata["parts"])
    parts[name][1] = [1, *parts[name][1]]
    metadata["parts"] = json.dumps(parts)


def integers(tensors, _):
    name = largest(tensors)
    tensors[name] = tensors[name].to(torch.int32)


def nan(tensors, _):
    tensors[largest(tensors)].view(-1)[-1] = math.nan


def infinite(tensors, _):
    tensors[largest(tensors)].view(-1)[0] = -math.inf


def negative_moment(tensors, _):
    name = next(name for name in tensors if name.endswith("exp_avg_sq"))
    tensors[name].view(-1)[0] = -1.0


def steps(value: str):
    def edit(_, metadata):
        metadata["steps"] = value

    return edit


def tensor_forgeries():
    for layout in LAYOUTS:
        for kind, file in (("weights", WEIGHTS[layout]), ("optimizer", OPTIMIZER[layout])):
            for edit in (drop, add, rename, shorten, other_shape, integers, nan, infinite):
                yield Forgery(f"{layout} {kind} {edit.__name__}", layout, in_tensors(file, edit))
        file = OPTIMIZER[layout]
        yield Forgery(f"{layout} optimizer negative", layout, in_tensors(file, negative_moment))
        for value in ("-1", "0", "2", "x", "9" * 30):
            yield Forgery(f"{layout} optimizer steps {value[:3]}", layout, in_tensors(file, steps(value)))


# --- values -----------------------------------------------------------------------------------------------


def set_entry(content: Any, place: tuple, value: Any) -> None:
    for key in place[:-1]:
        content = content[key]
    if value is ...:
        del content[place[-1]]
    else:
        content[place[-1]] = value


def in_state(file: str, place: tuple, value: Any):
    def change(checkpoint: Path) -> None:
        state = torch.load(checkpoint / file, weights_only=True)
        set_entry(state, place, value)
        torch.save(state, checkpoint / file)

    return change


def in_json(file: str, place: tuple, value: Any):
    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / file).read_text())
        set_entry(content, place, value)
        (checkpoint / file).write_text(json.dumps(content))

    return change


STATES = {
    "craft_state.pt": [
        *((("multiplier",), value) for value in (math.nan, math.inf, -1.0, 1e30, "x", ...)),
        *((("progress", "step"), value) for value in (0, 2, -1, 1.0, 1 << 70, ...)),
        *((("progress", "samples_seen"), value) for value in (-1, 2.0, "2", 1 << 70)),
        *((("progress", "anchors_seen"), value) for value in (-1, None)),
        *((("progress", "skipped"), value) for value in (-1, 2)),
        (("progress", "skipped_in_a_row"), 1),
        (("progress", "asked"), [-1, 1, 1]),
        (("progress", "losses"), ["x"]),
        (("progress", "evil"), 1),
        (("history",), [{"step": 1}]),
        (("history",), 3),
        (("dataset_samples",), 3),
        (("dataset_fingerprint", "data"), "0" * 64),
        (("tracker_run_ids",), [1]),
    ],
    "scheduler.pt": [
        *((("last_epoch",), value) for value in (-5, "x", 100, math.nan, ...)),
        (("_step_count",), "x"),
    ],
}
JSONS = {
    "config.json": [
        (("type",), "act"),
        (("chunk_size",), 10**9),
        (("vocab_size",), 7),
        (("text_depth",), 1),
        (("input_features",), {}),
        (("output_features", "action", "shape"), [99]),
        (("normalization_mapping",), {"STATE": "X"}),
    ],
    "train_config.json": [
        (("batch_size",), 0),
        (("steps",), -1),
        (("seed",), "x"),
        (("evil",), 1),
        (("craft", "lambda_max"), -1.0),
        (("craft", "anchor_cache_dir"), "/nonexistent/anchors"),
        (("dataset", "root"), "/nonexistent/data"),
        (("policy", "type"), "groot"),
        (("policy", "text_depth"), 1),
        (("engine", "dtype"), "float7"),
    ],
    "policy_preprocessor.json": [
        (("steps",), []),
        (("steps", 0), {"class": "os.system"}),
        (("steps", 0, "registry_name"), "reward_classifier_processor"),
    ],
    "policy_postprocessor.json": [(("steps",), []), (("steps", 0), {"registry_name": "no_such"})],
}
ADAPTERS = [
    (("r",), 3),
    (("lora_alpha",), 999),
    (("use_rslora",), True),
    (("use_dora",), True),
    (("target_modules",), ["lm_head"]),
    (("modules_to_save",), ["lm_head"]),
    (("bias",), "all"),
    (("peft_type",), "IA3"),
    (("base_model_name_or_path",), "/nonexistent/base"),
    (("layers_to_transform",), [0]),
    (("rank_pattern",), {"q_proj": 3}),
]


def shown(place: tuple, value: Any) -> str:
    return f"{'.'.join(map(str, place))}={'(none)' if value is ... else str(value)[:24]}"


def value_forgeries():
    for file, changes in STATES.items():
        for place, value in changes:
            yield Forgery(f"full {file} {shown(place, value)}", "full", in_state(file, place, value))
    for file, changes in JSONS.items():
        for place, value in changes:
            yield Forgery(f"full {file} {shown(place, value)}", "full", in_json(file, place, value))
    for place, value in ADAPTERS:
        file = "adapter_config.json"
        yield Forgery(f"adapters {file} {shown(place, value)}", "adapters", in_json(file, place, value))


# --- files ------------------------------------------------------------------------------------------------


def replaced(file: str, kind: str):
    def change(checkpoint: Path) -> None:
        path = checkpoint / file
        kept = path.rename(checkpoint.parent / "kept")
        match kind:
            case "link":
                path.symlink_to(kept)
            case "directory":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "empty":
                path.touch()

    return change


def file_forgeries():
    for layout in LAYOUTS:
        for file in (WEIGHTS[layout], OPTIMIZER[layout], "craft_state.pt", "policy_preprocessor.json"):
            for kind in ("removed", "link", "directory", "pipe", "empty"):
                yield Forgery(f"{layout} {file} {kind}", layout, replaced(file, kind))


FORGERIES = [*tensor_forgeries(), *value_forgeries(), *file_forgeries()]


def test_there_are_enough_distinct_forgeries():
    assert len({forgery.name for forgery in FORGERIES}) == len(FORGERIES) > 150


def forge(originals, forgery: Forgery, run: Path) -> Path:
    checkpoint = shutil.copytree(originals[forgery.layout], run / "step_000001")
    forgery.change(checkpoint)
    seal(checkpoint)
    return checkpoint


@pytest.mark.sample(12)
@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_a_forged_checkpoint_is_not_resumed(originals, train, tmp_path, forgery):
    run = tmp_path / "run"
    config = forge(originals, forgery, run) / "train_config.json"
    ended = train(None, f"--config_path={config}", "--resume=true", f"--output_dir={run}")
    assert ended.status == 2, ended
    assert ended.errors.count("\n") == 1, ended.errors
    assert not (run / "final").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_original_is_resumed(originals, train, tmp_path, layout):
    run = tmp_path / "run"
    config = forge(originals, Forgery("", layout, lambda _: None), run) / "train_config.json"
    ended = train(None, f"--config_path={config}", "--resume=true", f"--output_dir={run}")
    assert ended.status == 0, ended
    assert (run / "final").is_dir()


EXPORTED = [
    forgery
    for forgery in FORGERIES
    if f"{forgery.layout} weights" in forgery.name and forgery.layout != "adapters"
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("forgery", EXPORTED, ids=lambda forgery: forgery.name)
def test_forged_weights_are_not_exported(originals, tmp_path, forgery):
    checkpoint = forge(originals, forgery, tmp_path / "run")
    refused(lambda: export_checkpoint(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
