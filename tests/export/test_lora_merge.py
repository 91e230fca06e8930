"""Merged weights compared with PEFT's own merge, and merges that are refused."""

import json
import shutil
import tracemalloc

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from craft_ds.errors import UserError
from craft_ds.export.lora_merge import MergedWeights
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, AdapterPlan, plan_stored_adapters
from craft_ds.lora.peft_config import ADAPTER_CONFIG
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastPolicy
from craft_ds.tensor_io import tensor_file
from craft_ds.tensor_io.tensor_file import write_tensor_file

KINDS = [
    "attention",
    "attention_mlp",
    "attention_mlp_vision",
    "rslora",
    "dora",
    "gaussian",
    "modules_to_save",
]
LANGUAGE = r".*\.language_model\.layers\.\d+\.self_attn\.[qv]_proj"


def open_merged(directory, base_path=""):
    plan = plan_stored_adapters(directory, str(base_path))
    return MergedWeights(build_policy(load_policy_config(plan.base), plan.base), plan)


def read_all(merged):
    with merged:
        return {
            name: merged.read(name, 0, shape.numel()).view(shape)
            for name, shape in ((spec.name, torch.Size(spec.shape)) for spec in merged.specs)
        }


def by_peft(directory, base):
    """Merge with stock code: the base policy loaded by LeRobot, PEFT's adapters on it, PEFT's merge."""
    policy = TinyPI0FastPolicy.from_pretrained(base, strict=True)
    return peft.PeftModel.from_pretrained(policy, directory).merge_and_unload().state_dict()


def assert_merged(found, expected, base):
    """Assert equal tensors; return the names of those that differ from the base's."""
    assert found.keys() == expected.keys() == base.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-6, atol=1e-7, msg=name)
    return {name for name, tensor in base.items() if not torch.equal(found[name].float(), tensor.float())}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pefts_own_merge(adapted, inputs, kind):
    found, base = read_all(open_merged(adapted(kind))), load_file(inputs.policy / "model.safetensors")
    changed = assert_merged(found, by_peft(adapted(kind), inputs.policy), base)
    stored = {name.split(".lora_")[0] for name in load_file(adapted(kind) / ADAPTER_WEIGHTS)}
    wanted = {name.removeprefix("base_model.model.").removesuffix(".weight") for name in stored}
    # Every layer with adapters was merged, and nothing else changed.
    assert {name.removesuffix(".weight") for name in changed} == wanted
    assert len(wanted) > 5


def adapters_of_peft(base, path, **options):
    """Create adapters by PEFT alone, with random values and without the checksum of their base."""
    config = peft.LoraConfig(target_modules=LANGUAGE, init_lora_weights=False, **options)
    model = peft.get_peft_model(TinyPI0FastPolicy.from_pretrained(base, strict=True), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    model.save_pretrained(str(path))
    content = json.loads((path / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
    (path / ADAPTER_CONFIG).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_each_layer_has_its_own_rank_and_scale(inputs, tmp_path, options):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 31}}
    torch.manual_seed(0)
    path = adapters_of_peft(inputs.policy, tmp_path / "adapters", r=5, lora_alpha=7, **patterns, **options)
    base = load_file(inputs.policy / "model.safetensors")
    changed = assert_merged(read_all(open_merged(path)), by_peft(path, inputs.policy), base)
    assert len(changed) == 4


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_a_base_in_bf16_is_merged_in_fp32(inputs, tmp_path, options):
    base = tmp_path / "base"
    shutil.copytree(inputs.policy, base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    path = adapters_of_peft(base, tmp_path / "adapters", r=4, lora_alpha=1, **options)
    found = read_all(open_merged(path))
    changed = assert_merged(found, by_peft(path, base), weights)
    assert len(changed) == 4
    assert all(found[name].dtype == (torch.float32 if name in changed else torch.bfloat16) for name in found)


@pytest.mark.parametrize("kind", ["dora", "modules_to_save"])
def test_any_range_equals_that_range_of_the_full_tensor(adapted, kind):
    full = read_all(open_merged(adapted(kind)))
    with open_merged(adapted(kind)) as merged:
        for name, tensor in full.items():
            count = tensor.numel()
            for start, stop in ((0, 0), (0, 1), (count // 3, count // 2 + 1), (count - 1, count)):
                part = merged.read(name, start, stop)
                torch.testing.assert_close(part, tensor.flatten()[start:stop], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_merge_needs_the_memory_of_a_few_pieces(tmp_path, monkeypatch, use_dora):
    piece, wide = 1 << 14, nn.Sequential(nn.Linear(1000, 2000), nn.Linear(2000, 3, bias=False))
    save_file(wide.half().state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(tensor_file, "_PIECE", piece)
    config = peft.LoraConfig(target_modules=["0"], r=4, use_dora=use_dora)
    with MergedWeights(wide.to("meta"), AdapterPlan(config, tmp_path, None)) as merged:
        tracemalloc.start()
        with MemoryCounter() as memory:
            write_tensor_file(tmp_path / "merged", merged.specs, merged.read)
        _, python_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Pieces in fp32, the adapters themselves and the file's header.
    bound = 4 * (5 * piece + 4 * (2000 + 1000)) + (1 << 16)
    assert 4 * piece < memory.peak + python_peak < bound < 4 * 1000 * 2000 / 10
    merged, base = load_file(tmp_path / "merged"), load_file(tmp_path / "model.safetensors")
    for name, tensor in base.items():  # new adapters change nothing
        torch.testing.assert_close(merged[name], tensor, rtol=1e-3, atol=1e-7)


def test_another_base_is_refused(adapted, inputs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(inputs.policy, other)
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    weights[name].view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="were trained on another base policy"):
        open_merged(adapted("attention_mlp"), other)
    moved = tmp_path / "moved"
    shutil.copytree(inputs.policy, moved)
    with open_merged(adapted("attention_mlp"), moved) as merged:
        assert merged.read(name, 0, 1).shape == (1,)


@pytest.mark.parametrize("damage", ["cut off", "gone", "of another rank"])
def test_a_damaged_adapter_file_is_refused(adapted, tmp_path, damage):
    directory = tmp_path / "adapters"
    shutil.copytree(adapted("attention_mlp"), directory)
    file = directory / ADAPTER_WEIGHTS
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "gone":
        file.unlink()
    else:
        content = json.loads((directory / ADAPTER_CONFIG).read_text()) | {"r": 4}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{ADAPTER_WEIGHTS} (is missing or damaged|has another shape)"):
        open_merged(directory)


def test_a_missing_base_is_requested_by_the_flag_of_the_command(adapted, inputs, tmp_path):
    directory = tmp_path / "adapters"
    shutil.copytree(adapted("attention_mlp"), directory)
    content = json.loads((directory / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": None}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names no base policy .*: set --base_path to"):
        plan_stored_adapters(directory, flag="--base_path")
    assert plan_stored_adapters(directory, str(inputs.policy)).base == inputs.policy


def test_a_shared_weight_is_not_merged(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.words.weight

    save_file({"words.weight": torch.ones(6, 4)}, tmp_path / "model.safetensors")
    config = peft.LoraConfig(target_modules=["head"], r=2, base_model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match=r"head.weight has adapters and is shared with another layer"):
        MergedWeights(Tied(), AdapterPlan(config, tmp_path, None))
