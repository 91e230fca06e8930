"""Reading any file content gives the written values or one documented error.

The examples are the same in every run; `--all` draws more of them.
"""

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from file_damage import MANIFEST, read_manifest, read_or_refused, seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from craft_ds.anchors.cache import METADATA_FILE, AnchorCache
from craft_ds.config.parser import parse_arguments
from craft_ds.lora.peft_config import read_adapter_config
from craft_ds.policies.directory import copy_policy_files
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.policies.weights import weight_files
from craft_ds.tensor_io.safe_json import parse_object
from craft_ds.tensor_io.tensor_file import TensorFile
from craft_ds.testing.datasets import edit_metadata, write_test_cache

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.sampled_from([1 << 31, 1 << 63, 1 << 70, -1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "0", "1.5", "true", "null", "a/b", "\0", "é\ud800"])
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def fuzz(request) -> Callable[..., None]:
    """Check a property for `examples` examples, or with `--all` four times as many."""

    def fuzz(examples: int, examined: Callable[[Any], None], strategy: st.SearchStrategy) -> None:
        factor = 4 if request.config.getoption("--all", default=False) else 1

        @settings(
            max_examples=examples * factor,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        @given(strategy)
        def holds(example):
            examined(example)

        holds()

    return fuzz


def places(content: Any, way: tuple = ()) -> list[tuple]:
    """Return the path to every entry of a JSON value."""
    entries = content.items() if isinstance(content, dict) else ()
    entries = enumerate(content) if isinstance(content, list) else entries
    found = [way] if way else []
    for key, value in entries:
        found += places(value, (*way, key))
    return found


@st.composite
def mutated(draw, valid: Any) -> Any:
    """A valid JSON value with one to three entries dropped, replaced, retyped, renamed or repeated."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        known = places(content)
        if not known:
            return content
        *way, last = draw(st.sampled_from(known))
        parent = content
        for key in way:
            parent = parent[key]
        value = parent[last]
        match draw(st.sampled_from(["drop", "replace", "retype", "rename", "repeat"])):
            case "drop":
                del parent[last]
            case "replace":
                parent[last] = draw(anything)
            case "retype":
                other = [str(value), [value], {"x": value}, None, bool(value)]
                if isinstance(value, int | float):
                    other += [-value, value + 1, float(value), value * 2**40]
                parent[last] = draw(st.sampled_from(other))
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=6))] = parent.pop(last)
            case _ if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(value))
    return content


@st.composite
def flipped(draw, content: bytes) -> bytes:
    """Bytes with one to three random changes, deletions or insertions."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "end"])):
            case "flip":
                changed[place : place + 1] = bytes([changed[place] ^ 1 << draw(st.integers(0, 7))])
            case "cut":
                del changed[place : place + draw(st.integers(1, 9))]
            case "insert":
                changed[place:place] = draw(st.binary(min_size=1, max_size=5))
            case "end":
                del changed[place:]
        if not changed:
            break
    return bytes(changed)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def jsons(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON files: random values, a valid value changed, and the bytes of a valid file changed."""
    return mutated(valid).map(as_json) | flipped(as_json(valid)) | anything.map(as_json)


def test_parse_object_returns_an_object_or_a_value_error(fuzz):
    def examined(text: bytes) -> None:
        found = read_or_refused(lambda: parse_object(text), ValueError)
        assert found is None or isinstance(found, dict)

    fuzz(200, examined, st.binary(max_size=30) | jsons({"a": {"b": [1, {"c": None}]}, "d": "e"}))


# --- safetensors ------------------------------------------------------------------------------------------


def test_a_header_is_refused_or_read_like_the_reference(fuzz, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), "c": torch.empty(0, 2)}
    save_file(tensors, path, {"format": "pt", "steps": "7"})
    original = path.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    header, body = json.loads(original[8:start]), original[start:]

    def framed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    def examined(content: bytes) -> None:
        path.write_bytes(content)
        file = read_or_refused(lambda: TensorFile(path), ValueError)
        if file is None:
            return
        with file, safe_open(path, framework="pt") as reference:
            assert {name: list(shape) for name, shape, _ in file.specs()} == {
                name: reference.get_slice(name).get_shape()
                for name in reference.keys()  # noqa: SIM118
            }
            for name, shape, dtype in file.specs():
                values = file.read(name, 0, math.prod(shape))
                theirs = reference.get_tensor(name)
                assert theirs.dtype == dtype
                assert values.numpy().tobytes() == theirs.numpy().tobytes()

    fuzz(400, examined, jsons(header).map(framed) | flipped(original) | st.binary(max_size=40))


# --- anchor caches ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path) -> Path:
    write_test_cache(tmp_path / "cache", [0, 0, 1, 1, 2, 0], [0, 0, 1, 1, 2, 3], heldout_episodes=[3])
    return tmp_path / "cache"


def test_metadata_is_refused_or_unchanged(fuzz, cache):
    text = (cache / METADATA_FILE).read_bytes()
    original = AnchorCache.open(cache).metadata

    def examined(changed: bytes) -> None:
        (cache / METADATA_FILE).write_bytes(changed)
        found = read_or_refused(lambda: AnchorCache.open(cache))
        if found is None:
            return
        assert found.metadata == original

    fuzz(200, examined, jsons(json.loads(text)) | flipped(text))


def test_metadata_with_valid_checksum_is_refused_or_usable(fuzz, cache):
    original = json.loads((cache / METADATA_FILE).read_text())
    stored = AnchorCache.open(cache).read(range(6))

    def examined(metadata: Any) -> None:
        (cache / METADATA_FILE).write_text("{}")
        edit_metadata(cache, **(metadata if isinstance(metadata, dict) else {}))
        found = read_or_refused(lambda: AnchorCache.open(cache))
        if found is None:
            return
        assert len(found) == 6
        read = found.read(range(6))
        assert read.keys() == stored.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())
        assert sorted(chain(*found.splits.values())) == list(range(6))
        assert all(0 <= task < len(found.tasks) for task in found.task.tolist())

    fuzz(250, examined, mutated(original))


# --- manifests --------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(adapted, tmp_path) -> Path:
    return shutil.copytree(adapted("attention_mlp"), tmp_path / "run" / "final")


def test_a_manifest_is_refused_or_unchanged(fuzz, checkpoint):
    text = (checkpoint / MANIFEST).read_bytes()
    original = read_manifest(checkpoint)

    def examined(changed: bytes) -> None:
        (checkpoint / MANIFEST).write_bytes(changed)
        found = read_or_refused(lambda: read_manifest(checkpoint))
        if found is None:
            return
        assert found == original

    fuzz(150, examined, jsons(json.loads(text)) | flipped(text))


def test_manifest_with_valid_checksum_is_refused_or_usable(fuzz, checkpoint):
    original = json.loads((checkpoint / MANIFEST).read_text())

    def examined(manifest: Any) -> None:
        (checkpoint / MANIFEST).write_text("{}")
        seal(checkpoint, **{"files": None, **manifest} if isinstance(manifest, dict) else {"files": None})
        found = read_or_refused(lambda: read_manifest(checkpoint))
        if found is None:
            return
        assert all(type(found[name]) is int and found[name] >= 0 for name in ("step", "world_size"))
        for name, entry in found["files"].items():
            path = checkpoint / name
            assert path.resolve().is_relative_to(checkpoint.resolve())
            assert path.stat().st_size == entry["bytes"]

    fuzz(150, examined, mutated(original))


# --- configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_configuration_file_is_read_or_one_error(fuzz, inputs, checkpoint, tmp_path, suffix, monkeypatch):
    file = tmp_path / f"config{suffix}"
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])
    original = json.loads((checkpoint / "train_config.json").read_text())
    if suffix == ".yaml":  # like one written by hand
        chosen = ("dataset", "steps", "batch_size", "craft", "engine", "wandb", "seed")
        original = {name: original[name] for name in chosen}
        original["policy"] = {"path": str(inputs.policy), "optimizer_lr": 1e-3}
    texts = jsons(original)
    if suffix == ".yaml":
        texts |= mutated(original).map(lambda content: yaml.safe_dump(content, allow_unicode=False).encode())
        texts |= flipped(yaml.safe_dump(original).encode())

    def examined(text: bytes) -> None:
        file.write_bytes(text)
        read_or_refused(read)

    def read() -> None:
        parse_arguments([f"--config_path={file}", f"--output_dir={tmp_path / 'new'}"]).validate()

    file.write_bytes(as_json(original))
    read()
    fuzz(25, examined, texts)


POLICY_FILES = ["config.json", "policy_preprocessor.json", "policy_postprocessor.json"]


@pytest.mark.parametrize("name", [*POLICY_FILES, "text_tokenizer/tokenizer_config.json"])
def test_a_policy_is_loaded_or_refused(fuzz, inputs, tmp_path, name):
    policy = shutil.copytree(inputs.policy, tmp_path / "in" / "policy")
    original = json.loads((policy / name).read_text())

    def examined(text: bytes) -> None:
        (policy / name).write_bytes(text)
        read_or_refused(lambda: load_processors(load_policy_config(policy), policy))
        target = tmp_path / "out" / "copy"
        read_or_refused(lambda: copy_policy_files(policy, target, target))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["copy"]
        shutil.rmtree(tmp_path / "out")

    fuzz(30, examined, jsons(original))


def test_adapters_are_refused_or_valid(fuzz, checkpoint):
    original = json.loads((checkpoint / "adapter_config.json").read_text())

    def examined(text: bytes) -> None:
        (checkpoint / "adapter_config.json").write_bytes(text)
        found = read_or_refused(lambda: read_adapter_config(checkpoint))
        assert found is None or found.r >= 1

    fuzz(100, examined, jsons(original))


def test_an_index_names_files_in_its_directory_or_is_refused(fuzz, tmp_path):
    policy = tmp_path / "policy"
    policy.mkdir()
    for number in range(3):
        (policy / f"model-{number}.safetensors").touch()
    original = {"weight_map": {name: f"model-{ord(name) % 3}.safetensors" for name in "abcdef"}}

    def examined(text: bytes) -> None:
        (policy / "model.safetensors.index.json").write_bytes(text)
        found = read_or_refused(lambda: weight_files(policy)) or []
        assert all(file.parent == policy and file.is_file() for file in found)

    fuzz(150, examined, jsons(original))
