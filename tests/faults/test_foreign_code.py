"""Plants of foreign code: each runs when it is loaded in the naive way, and never in craft-ds."""

import importlib
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pytest
import torch
import yaml
from file_damage import seal
from transformers import AutoConfig, AutoTokenizer

from craft_ds.config.parser import parse_arguments
from craft_ds.training.trainer import train_craft


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def program(marker: Path) -> str:
    return f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"


class Place(NamedTuple):
    """Copies of everything that a run reads, and the marker that a plant makes."""

    policy: Path
    data: Path
    anchors: Path
    checkpoint: Path
    config: Path
    marker: Path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def script(where: str, name: str):
    """Plant a program that some tool would run by its name."""

    def plant(place: Place) -> Callable[[], object]:
        path = getattr(place, where) / name
        path.write_text(program(place.marker))
        return lambda: runpy.run_path(str(path))

    return plant


def torch_pickle(where: str, name: str):
    def plant(place: Place) -> Callable[[], object]:
        path = getattr(place, where) / name
        torch.save({"w": Bomb(place.marker)}, path)
        return lambda: torch.load(path, weights_only=False)

    return plant


def plain_pickle(where: str, name: str):
    def plant(place: Place) -> Callable[[], object]:
        path = getattr(place, where) / name
        path.write_bytes(pickle.dumps(Bomb(place.marker)))
        return lambda: pickle.loads(path.read_bytes())

    return plant


def numpy_pickle(where: str, name: str):
    def plant(place: Place) -> Callable[[], object]:
        path = getattr(place, where) / name
        np.save(path, np.array([Bomb(place.marker)], dtype=object), allow_pickle=True)
        return lambda: np.load(path, allow_pickle=True)

    return plant


def auto_map(where: str, folder: str, file: str):
    """Plant a Python file that transformers imports if its code is trusted."""

    def plant(place: Place) -> Callable[[], object]:
        directory = getattr(place, where) / folder
        (directory / "evil.py").write_text(program(place.marker) + "class Evil:\n    pass\n")
        code = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}
        kind = AutoTokenizer if "token" in file else AutoConfig
        edit(directory / file, auto_map=code, **({"tokenizer_class": "Evil"} if "token" in file else {}))

        def load() -> None:
            if kind is AutoConfig:  # of a type that transformers does not know
                edit(directory / file, model_type="evil")
            kind.from_pretrained(directory, trust_remote_code=True)

        return load

    return plant


def yaml_tag(place: Place) -> Callable[[], object]:
    text = f"seed: !!python/object/apply:os.mkdir ['{place.marker}']\n"
    place.config.write_text(text)
    return lambda: yaml.unsafe_load(text)


def yaml_in_checkpoint(place: Place) -> Callable[[], object]:
    text = f"output_dir: !!python/object/apply:os.mkdir ['{place.marker}']\n"
    (place.checkpoint / "train_config.json").write_text(text)
    return lambda: yaml.unsafe_load(text)


def instantiate(call: dict[str, str], key: str) -> None:
    module, _, name = call[key].rpartition(".")
    getattr(importlib.import_module(module), name)(call["path"])


def target(key: str):
    """Plant a call as hydra-like tools store it."""

    def plant(place: Place) -> Callable[[], object]:
        call = {key: "os.mkdir", "path": str(place.marker)}
        place.config.write_text(yaml.safe_dump({"optimizer": call, "seed": 3}))
        return lambda: instantiate(yaml.safe_load(place.config.read_text())["optimizer"], key)

    return plant


def target_in_checkpoint(place: Place) -> Callable[[], object]:
    path = place.checkpoint / "train_config.json"
    edit(path, optimizer={"_target_": "os.mkdir", "path": str(place.marker)})
    return lambda: instantiate(json.loads(path.read_text())["optimizer"], "_target_")


def imported(change: Callable[[Place], object]):
    """Plant a module on the path, and its name where a loader could import it."""

    def plant(place: Place) -> Callable[[], object]:
        (place.policy.parent / "evil_plugin.py").write_text(program(place.marker))
        change(place)
        return lambda: importlib.import_module("evil_plugin")

    return plant


def discovery(place: Place) -> None:
    policy = {"discover_packages_path": "evil_plugin", "path": str(place.policy)}
    place.config.write_text(yaml.safe_dump({"policy": policy}))


def discovery_in_checkpoint(place: Place) -> None:
    path = place.checkpoint / "train_config.json"
    policy = json.loads(path.read_text())["policy"] | {"discover_packages_path": "evil_plugin"}
    edit(path, policy=policy, env={"discover_packages_path": "evil_plugin", "type": "evil"})


def adapter_mapping(place: Place) -> None:
    mapping = {"base_model_class": "Evil", "parent_library": "evil_plugin"}
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "auto_mapping": mapping}
    adapter |= {"base_model_name_or_path": str(place.policy), "megatron_core": "evil_plugin"}
    (place.policy / "adapter_config.json").write_text(json.dumps(adapter))


def step_class(place: Place) -> None:
    path = place.policy / "policy_preprocessor.json"
    nested = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}, "steps": []}}
    nested["config"]["steps"] = [{"class": "evil_plugin.Step"}]
    edit(path, steps=[*json.loads(path.read_text())["steps"], nested, {"class": "evil_plugin.Step"}])


def chat_template(place: Place) -> Callable[[], object]:
    text = "{{ cycler.__init__.__globals__.os.mkdir('" + str(place.marker) + "') }}"
    (place.policy / "text_tokenizer" / "chat_template.jinja").write_text(text)
    return lambda: jinja2.Environment().from_string(text).render()


def in_its_directory(name: str):
    """Plant a module that Python imports by itself from the directory it is started in."""

    def plant(place: Place) -> Callable[[], object]:
        (place.checkpoint / name).write_text(program(place.marker))
        environment = {**os.environ, "PYTHONPATH": str(place.checkpoint)}
        return lambda: subprocess.run(
            [sys.executable, "-c", f"import {Path(name).stem}"], env=environment, check=True
        )

    return plant


PLANTS: dict[str, Callable[[Place], Callable[[], object]]] = {
    "pickle as .bin weights": torch_pickle("policy", "pytorch_model.bin"),
    "pickle as .ckpt": plain_pickle("policy", "last.ckpt"),
    "pickle as training state": torch_pickle("checkpoint", "craft_state.pt"),
    "pickle as schedule": torch_pickle("checkpoint", "scheduler.pt"),
    "pickle as optimizer.pt": torch_pickle("checkpoint", "optimizer.pt"),
    "pickle as weights": plain_pickle("policy", "model.safetensors"),
    "pickle as statistics": plain_pickle("data", "meta/stats.json"),
    "numpy objects in a data set": numpy_pickle("data", "meta/stats.npy"),
    "numpy objects as anchors": numpy_pickle("anchors", "shard_00000.npy"),
    "auto_map of a policy": auto_map("policy", "", "config.json"),
    "auto_map of a tokenizer": auto_map("policy", "text_tokenizer", "tokenizer_config.json"),
    "auto_map of a checkpoint": auto_map("checkpoint", "text_tokenizer", "tokenizer_config.json"),
    "script of a data set": script("data", "data.py"),
    "script of anchors": script("anchors", "anchors.py"),
    "conftest in a checkpoint": script("checkpoint", "conftest.py"),
    "sitecustomize in a checkpoint": in_its_directory("sitecustomize.py"),
    "json.py in a checkpoint": in_its_directory("usercustomize.py"),
    "YAML tag": yaml_tag,
    "YAML tag in a checkpoint": yaml_in_checkpoint,
    "_target_": target("_target_"),
    "type": target("type"),
    "_target_ in a checkpoint": target_in_checkpoint,
    "plugin in a file": imported(discovery),
    "plugin in a checkpoint": imported(discovery_in_checkpoint),
    "auto_mapping of adapters": imported(adapter_mapping),
    "nested step": imported(step_class),
    "chat template": chat_template,
}


@pytest.fixture(scope="module")
def original(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("original") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(output), "--steps=2", "--save_freq=1"]))
    return output / "step_000001"


@pytest.fixture
def place(inputs, original, tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    sources = {"policy": inputs.policy, "data": inputs.new, "anchors": inputs.anchors}
    copies = {name: shutil.copytree(source, tmp_path / "in" / name) for name, source in sources.items()}
    checkpoint = shutil.copytree(original, tmp_path / "run" / "step_000001")
    yield Place(
        **copies, checkpoint=checkpoint, config=tmp_path / "run.yaml", marker=tmp_path / "foreign_code_ran"
    )
    for name in [name for name in sys.modules if name.startswith(("transformers_modules", "evil_plugin"))]:
        del sys.modules[name]


@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", PLANTS)
def test_planted_code_never_runs(train, inputs, place, tmp_path, kind):
    naive = PLANTS[kind](place)
    seal(place.checkpoint)
    flags = [*inputs.craft_flags(), f"--policy.path={place.policy}", f"--dataset.root={place.data}"]
    flags += [f"--craft.anchor_cache_dir={place.anchors}", "--steps=1"]
    if place.config.exists():
        flags.append(f"--config_path={place.config}")
    statuses = [train(tmp_path / "new", *flags).status]
    config = place.checkpoint / "train_config.json"
    resumed = train(
        None, f"--config_path={config}", "--resume=true", f"--output_dir={place.checkpoint.parent}"
    )
    statuses.append(resumed.status)
    assert not place.marker.exists()
    assert set(statuses) <= {0, 2}
    naive_error = None
    try:
        naive()
    except Exception as error:  # the plant has run by then
        naive_error = error
    assert place.marker.exists(), f"the plant does not work: {naive_error!r}"


def test_there_are_enough_plants():
    assert len(PLANTS) >= 20
