"""Invalid headers, configurations and paths: one clear error in bounded time and memory."""

import json
import math
import os
import shutil
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from file_damage import DEEP, files_of, not_a_file, refused, within
from safetensors.torch import load_file, save_file

from craft_ds.config.parser import parse_arguments
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.directory import copy_policy_files
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.weights import weight_files
from craft_ds.tensor_io.tensor_file import TensorFile


@pytest.fixture(autouse=True)
def bounded_time():
    """Limit the time of every test."""
    with within(20):
        yield


@pytest.fixture
def bounded_memory():
    """Limit the memory of a test to 64 MiB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26


# --- safetensors ------------------------------------------------------------------------------------------


def header_file(path: Path, header: str | bytes, body: int = 8, length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body))
    return path


def entry(shape, offsets=(0, 8), dtype="F32") -> str:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def damaged_header(path: Path) -> str:
    with pytest.raises(ValueError, match=f"{path.name} is not a safetensors file") as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


HEADERS = {
    "no JSON": "{{",
    "a list": "[]",
    "deep": '{"w":' + DEEP + "}",
    "deep objects": '{"w":' * 50_000 + "1" + "}" * 50_000,
    "no text": b"\xff\xfe\x00",
    "twice": entry([2])[:-1] + "," + entry([2])[1:],
    "a long number": '{"w": ' + "9" * 10_000 + "}",
    "huge": entry([1 << 62, 1 << 62]),
    "beyond 64 bits": entry([1 << 64]),
    "product that overflows to 2": entry([1 << 33, 1 << 31, 2]),
    "negative": entry([-1, -2]),
    "a float": entry([2.0]),
    "true": entry([True, 2]),
    "a text": entry("2"),
    "a hundred dimensions": entry([1] * 99 + [2]),
    "offsets outside": entry([4], (0, 16)),
    "offsets before": entry([2], (-8, 0)),
    "offsets reversed": entry([2], (8, 0)),
    "offsets of floats": entry([2], (0.0, 8.0)),
    "one offset": entry([2], (8,)),
    "offsets of another size": entry([1]),
    "bytes left over": entry([1], (0, 4)),
    "a gap before": entry([1], (4, 8)),
    "overlap": json.dumps(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")},
    ),
    "unknown dtype": entry([2], dtype="F31"),
    "a list as dtype": entry([2], dtype=["F32"]),
    "no entry": '{"w": null}',
    "metadata of numbers": entry([2])[:-1] + ', "__metadata__": {"steps": 3}}',
    "metadata of lists": entry([2])[:-1] + ', "__metadata__": []}',
}


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_does_not_describe_its_file(tmp_path, what):
    damaged_header(header_file(tmp_path / "x.safetensors", HEADERS[what]))


def test_a_valid_header_is_read(tmp_path):
    with TensorFile(header_file(tmp_path / "x.safetensors", entry([2]))) as file:
        assert file.read("w", 0, 2).tolist() == [0, 0]


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("length", [0, 9, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_an_invalid_header_length(tmp_path, length):
    path = header_file(tmp_path / "x.safetensors", "{}", body=0, length=length)
    if length == 100_000_001:
        os.truncate(path, 1 << 30)  # a hole: the file is as large as its header says
    damaged_header(path)


@pytest.mark.parametrize("kind", ["directory", "loop", "pipe", "empty"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_tensor_file_that_is_not_a_regular_file(tmp_path, kind, writable):
    path = not_a_file(tmp_path / "x.safetensors", kind)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        TensorFile(path, writable=writable)


# --- policy directories -----------------------------------------------------------------------------------


@pytest.fixture
def policy(inputs, tmp_path):
    """A copy of the policy that tests change."""
    return shutil.copytree(inputs.policy, tmp_path / "in" / "policy")


@contextmanager
def edited(path: Path):
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def load(path: Path) -> None:
    """Load a policy like training and export, without a command."""
    config = load_policy_config(path)
    load_processors(config, path)
    load_policy(config, path)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", "", ".", "..", None, 3, ["x"]],
)
def test_an_index_that_names_a_file_outside_its_directory(policy, name):
    (policy / "model.safetensors").rename(policy.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(policy.parent / "outside.safetensors"), name)
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    line = refused(lambda: weight_files(policy))
    assert "model.safetensors.index.json" in line
    assert refused(lambda: load(policy)) == line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": ' + DEEP + "}"])
def test_an_invalid_index(policy, text):
    (policy / "model.safetensors").unlink()
    (policy / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in refused(lambda: load(policy))


@pytest.mark.parametrize("processor", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize(
    "state",
    [
        "../secret.safetensors",
        "ABSOLUTE",
        "sub/x.safetensors",
        "model.safetensors",
        "config.json",
        "",
        None,
        7,
    ],
)
def test_a_processor_state_outside_its_directory(policy, tmp_path, processor, state):
    secret = policy.parent / "secret.safetensors"
    save_file({"secret": torch.ones(1)}, secret)
    with edited(policy / processor) as content:
        content["steps"][0]["state_file"] = str(secret) if state == "ABSOLUTE" else state
    target = tmp_path / "out" / "copy"
    line = refused(lambda: copy_policy_files(policy, target, target))
    assert processor in line
    assert "state_file" in line
    assert not any("secret" in name for name in files_of(tmp_path / "out"))
    assert processor in refused(lambda: load(policy))


@pytest.mark.parametrize("processor", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "{}", '{"steps": 3}', '{"steps": [3]}', '{"steps": [{"config": []}]}'),
        *('{"steps": [{}]}', '{"steps": [{"registry_name": "no_such"}]}', '{"steps": [], "steps": []}'),
        '{"steps": ' + DEEP + "}",
    ],
)
def test_an_invalid_processor(policy, processor, text):
    (policy / processor).write_text(text)
    assert str(policy) in refused(lambda: load(policy))


@pytest.mark.parametrize(
    "change",
    [
        {"text_depth": 10**9},
        {"vision_depth": 1001},
        {"vocab_size": 10**15},
        {"vocab_size": 10**400},
        {"text_width": -(1 << 40)},
        {"image_resolution": [1 << 20, 1 << 20]},
        {"image_resolution": None},
        {"text_width": "wide"},
        {"text_width": 0.5},
        {"text_width": 0},
        {"text_heads": 0},
        {"vision_patch": 0},
        {"input_features": {"x": {"type": "VISUAL", "shape": ["a"]}}},
        {"input_features": 3},
        {"normalization_mapping": {"STATE": "NONSENSE"}},
        {"text_tokenizer_name": "../../nowhere"},
        {"text_tokenizer_name": 7},
        {"type": "act"},
        {"type": "../../evil"},
        {"type": None},
        {"type": []},
    ],
    ids=str,
)
def test_an_invalid_policy_configuration(policy, change):
    if "text_tokenizer_name" in change:
        shutil.rmtree(policy / "text_tokenizer")
    with edited(policy / "config.json") as content:
        content |= change
    assert str(policy) in refused(lambda: load(policy))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", DEEP, '{"type": ' + DEEP + "}", '{"type": "a", "type": "b"}']
)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_configuration_that_is_not_an_object(policy, name, text):
    (policy / name).write_text(text)
    line = refused(lambda: load_trained_policy(load_policy_config(policy), policy))
    assert name in line


@pytest.mark.parametrize("kind", ["directory", "loop", "pipe", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "text_tokenizer/tokenizer_config.json",
        "text_tokenizer/tokenizer.json",
        "action_tokenizer/processor_config.json",
        "STATE",
    ],
)
def test_a_policy_file_that_is_not_a_regular_file(policy, name, kind):
    if name == "STATE":
        name = next(policy.glob("policy_preprocessor_step_*.safetensors")).name
    not_a_file(policy / name, kind)
    assert str(policy) in refused(lambda: load(policy))


@pytest.fixture
def adapters(adapted, inputs, tmp_path):
    """A copy of a policy with adapters that tests change."""
    return shutil.copytree(adapted("attention_mlp"), tmp_path / "adapters")


@pytest.mark.parametrize(
    "change",
    [
        {"r": 10**12},
        {"r": -1},
        {"r": 0},
        {"r": 2.5},
        {"r": "8"},
        {"r": [8]},
        {"lora_alpha": "x"},
        {"lora_alpha": math.inf},
        {"lora_dropout": 7},
        {"target_modules": 5},
        {"target_modules": [[]]},
        {"target_modules": "(a+)+b"},
        {"target_modules": "("},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": 3},
        {"rank_pattern": {"q_proj": 10**12}},
        {"rank_pattern": []},
        {"modules_to_save": 3},
        {"base_model_name_or_path": 7},
        {"base_model_name_or_path": ["x"]},
        {"megatron_config": {}, "megatron_core": "os"},
    ],
    ids=str,
)
def test_an_invalid_adapter_configuration(adapters, change):
    with edited(adapters / "adapter_config.json") as content:
        content |= change
    refused(lambda: load_trained_policy(load_policy_config(adapters), adapters))


# --- configuration files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("text", [DEEP, '{"steps": ' + DEEP + "}", "\0", "\ud800", "[", '"x"'])
def test_an_invalid_configuration_file(tmp_path, monkeypatch, suffix, text):
    monkeypatch.setattr("sys.argv", ["train_craft.py"])
    file = tmp_path / f"config{suffix}"
    file.write_bytes(text.encode(errors="surrogatepass"))
    assert str(file) in refused(lambda: parse_arguments([f"--config_path={file}"]))


@pytest.mark.parametrize("kind", ["directory", "loop", "pipe", "empty"])
def test_a_configuration_file_that_is_not_a_regular_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("sys.argv", ["train_craft.py"])
    file = not_a_file(tmp_path / "config.json", kind)
    assert str(file) in refused(lambda: parse_arguments([f"--config_path={file}"]))
