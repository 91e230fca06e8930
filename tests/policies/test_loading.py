"""Strict loading, and policy directories that stock LeRobot reads."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.processor_pi0_fast import make_pi0_fast_pre_post_processors
from lerobot.utils.constants import ACTION_TOKENS
from safetensors.torch import load_file, save_file

from craft_ds.errors import UserError
from craft_ds.policies import loading
from craft_ds.policies.directory import copy_policy_files
from craft_ds.policies.loading import (
    load_policy,
    load_policy_config,
    load_processors,
    policy_cameras,
    tokenizer_fingerprint,
)
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastPolicy
from craft_ds.policies.tiny_pi0_fast.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER, fit_action_tokenizer
from craft_ds.testing.policies import TASKS, make_test_policy_dir, random_batch, smooth_chunks

EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture
def own_dir(policy_dir, tmp_path):
    """A copy of the policy directory to damage."""
    return shutil.copytree(policy_dir, tmp_path / "policy")


def load(path):
    return load_policy(load_policy_config(path), path)


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_loading_equals_from_pretrained_buffers_included(policy_dir):
    state = torch.random.get_rng_state()
    policy, reference = load(policy_dir), TinyPI0FastPolicy.from_pretrained(policy_dir)
    theirs = dict(reference.named_parameters()) | dict(reference.named_buffers())
    ours = dict(policy.named_parameters()) | dict(policy.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = random_batch(policy.config, 2, seed=0)
    assert policy(batch)[0] == reference(batch)[0]
    assert not policy.training
    load(policy_dir)
    torch.random.set_rng_state(state)
    load(policy_dir)
    assert torch.equal(torch.random.get_rng_state(), state)  # no random weights were drawn


def test_the_configuration_names_the_directorys_own_tokenizers(policy_dir):
    config = load_policy_config(policy_dir)
    assert config.text_tokenizer_name == str(policy_dir / TEXT_TOKENIZER)
    assert config.action_tokenizer_name == str(policy_dir / ACTION_TOKENIZER)
    assert policy_cameras(config) == ["observation.images.top"]


def test_flags_override_the_configuration(policy_dir):
    assert load_policy_config(policy_dir, ["--dtype=bfloat16"]).dtype == "bfloat16"


def test_loading_does_not_change_the_configuration(policy_dir):
    config = load_policy_config(policy_dir)
    config.device = "cuda"
    assert load_policy(config, policy_dir, device="cpu").config.device == "cpu"
    assert config.device == "cuda"


def test_a_key_without_the_model_prefix_is_found(own_dir, policy_dir):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(own_dir, strip)
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(own_dir).parameters(), load(policy_dir).parameters(), strict=True)
    )


def test_a_missing_embedding_is_read_from_the_head(own_dir):
    rewrite(own_dir, lambda tensors: tensors.pop(EMBEDDING))
    state = load(own_dir).state_dict()
    assert torch.equal(state[EMBEDDING], state[HEAD])
    assert state[EMBEDDING].data_ptr() != state[HEAD].data_ptr()  # a start value, not a tie


def test_the_multi_file_form_of_the_hub_is_read(own_dir, policy_dir):
    tensors = load_file(own_dir / "model.safetensors")
    (own_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, own_dir / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (own_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(own_dir).parameters(), load(policy_dir).parameters(), strict=True)
    )
    (own_dir / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        load(own_dir)
    (own_dir / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load(own_dir)


def test_bf16_files_load_into_fp32_policies(own_dir):
    rewrite(own_dir, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    assert {p.dtype for p in load(own_dir).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), r"model\.safetensors lacks 1 tensors.*lm_head"),
        (
            lambda t: t.update({"model.extra": torch.zeros(2)}),
            r"model\.safetensors has unknown 1 tensors.*extra",
        ),
        (lambda t: t.update({HEAD: torch.zeros(3, 3)}), r"model\.safetensors has another shape.*lm_head"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused(own_dir, change, message):
    rewrite(own_dir, change)
    with pytest.raises(UserError, match=message):
        load(own_dir)


def test_missing_and_damaged_files_are_refused(own_dir):
    weights = own_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file, or is damaged"):
        load(own_dir)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing: the policy has no weights"):
        load(own_dir)
    (own_dir / "policy_preprocessor.json").unlink()
    with pytest.raises(UserError, match=r"policy_preprocessor\.json is missing"):
        load_processors(load_policy_config(own_dir), own_dir)
    (own_dir / "config.json").write_text('{"type": "no_such_policy"}')
    with pytest.raises(UserError, match=r"config\.json is not a policy configuration.*no_such_policy"):
        load_policy_config(own_dir)
    (own_dir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_policy_config(own_dir)


def test_missing_normalisation_statistics_are_refused(own_dir):
    next(own_dir.glob("policy_preprocessor_step_*.safetensors")).unlink()
    with pytest.raises(UserError, match="cannot load the processors"):
        load_processors(load_policy_config(own_dir), own_dir)


def test_a_missing_tokenizer_is_named(own_dir):
    shutil.rmtree(own_dir / ACTION_TOKENIZER)
    with pytest.raises(UserError, match=r"config\.json: action_tokenizer_name 'action_tokenizer' is neither"):
        load(own_dir)


def test_a_damaged_tokenizer_is_refused(own_dir):
    (own_dir / ACTION_TOKENIZER / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot build the policy"):
        load(own_dir)


def test_a_path_that_is_neither_folder_nor_hub_id(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a folder, and not a hub id"):
        load_policy_config(tmp_path / "nothing")

    def unreachable(*_, **__):
        raise OSError("the hub cannot be reached\nsecond line")

    monkeypatch.setattr(loading, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'outputs/run' is not a local folder.*cannot be reached$"):
        load_policy_config("outputs/run")


def test_a_hub_policy_is_read_from_its_snapshot(policy_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(policy_dir)
    )
    config = load_policy_config("someone/policy")
    load_policy(config, "someone/policy")
    load_processors(config, "someone/policy")
    assert {name for name, _ in asked} == {"someone/policy"}
    assert "optimizer.safetensors" not in asked[0][1]["allow_patterns"]


def raw_batch():
    return {
        "observation.images.top": torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "observation.state": torch.zeros(3, 4),
        "action": torch.from_numpy(smooth_chunks(3, seed=4)),
        "task": list(TASKS),
    }


@pytest.fixture
def stock_dir(own_dir):
    """Return what LeRobot saves for a pi0_fast with another skip than its default: two fields are lost."""
    tiny = load_policy_config(own_dir)
    config = PI0FastConfig(
        input_features=tiny.input_features,
        output_features=tiny.output_features,
        normalization_mapping=tiny.normalization_mapping,
        text_tokenizer_name=tiny.text_tokenizer_name,
        action_tokenizer_name=tiny.action_tokenizer_name,
        fast_skip_tokens=5,
        max_action_tokens=40,
        tokenizer_max_length=60,
        device="cpu",
    )
    bounds = {"min": -torch.ones(4), "max": torch.full((4,), 2.0)}
    pipelines = make_pi0_fast_pre_post_processors(config, {"observation.state": bounds, "action": bounds})
    config.save_pretrained(own_dir)
    for pipeline in pipelines:
        pipeline.save_pretrained(own_dir)
    step = json.loads((own_dir / "policy_preprocessor.json").read_text())["steps"][6]
    assert "fast_skip_tokens" not in step["config"]
    return own_dir, pipelines[0](raw_batch())


def test_stock_processors_reload_to_the_same_tokens(stock_dir):
    path, expected = stock_dir
    preprocess, _ = load_processors(load_policy_config(path), path)
    batch = preprocess(raw_batch())
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value), key


STOCK = """
import sys, torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file
path = sys.argv[1]
config = PreTrainedConfig.from_pretrained(path)
preprocess, _ = make_pre_post_processors(
    config, pretrained_path=path, preprocessor_overrides={"device_processor": {"device": "cpu"}}
)
raw = load_file(sys.argv[2])
tokens = preprocess(raw | {"task": sys.argv[3:]})["action.tokens"]
assert not any(name.startswith("craft_ds") for name in sys.modules)
assert torch.equal(tokens, load_file(path + "/expected.safetensors")["tokens"])
"""


@pytest.mark.slow
def test_copied_files_load_in_a_stock_process(stock_dir, tmp_path):
    path, expected = stock_dir
    copy_policy_files(path, tmp_path / "copy.tmp", tmp_path / "copy")
    (tmp_path / "copy.tmp").rename(tmp_path / "copy")
    save_file({"tokens": expected[ACTION_TOKENS]}, tmp_path / "copy" / "expected.safetensors")
    raw = raw_batch()
    tasks = raw.pop("task")
    save_file(raw, tmp_path / "raw.safetensors")
    arguments = [str(tmp_path / "copy"), str(tmp_path / "raw.safetensors"), *tasks]
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_copied_files_are_all_but_the_weights_and_point_home(policy_dir, tmp_path):
    (tmp_path / "final.tmp").mkdir()
    copy_policy_files(policy_dir, tmp_path / "final.tmp", tmp_path / "final")
    (tmp_path / "final.tmp").rename(tmp_path / "final")
    copied = {p.relative_to(tmp_path / "final") for p in (tmp_path / "final").rglob("*") if p.is_file()}
    complete = {p.relative_to(policy_dir) for p in policy_dir.rglob("*") if p.is_file()}
    assert {str(p) for p in complete - copied} == {"model.safetensors"}
    names = json.loads((tmp_path / "final" / "config.json").read_text())
    assert names["text_tokenizer_name"] == str(tmp_path / "final" / TEXT_TOKENIZER)
    preprocess, _ = make_pre_post_processors(
        load_policy_config(tmp_path / "final"), pretrained_path=str(tmp_path / "final")
    )
    ours, _ = load_processors(load_policy_config(policy_dir), policy_dir)
    assert torch.equal(preprocess(raw_batch())[ACTION_TOKENS], ours(raw_batch())[ACTION_TOKENS])


def test_hub_names_are_left_alone(own_dir, tmp_path):
    for folder in (TEXT_TOKENIZER, ACTION_TOKENIZER):
        shutil.rmtree(own_dir / folder)
    config = json.loads((own_dir / "config.json").read_text())
    config |= {"text_tokenizer_name": "google/paligemma-3b-pt-224", "some_later_field": 1}
    (own_dir / "config.json").write_text(json.dumps(config))
    copy_policy_files(own_dir, tmp_path / "copy", tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config


def test_fingerprint_knows_the_tokens_and_not_the_place(policy_dir, own_dir, tmp_path):
    config = load_policy_config(policy_dir)
    fingerprint = tokenizer_fingerprint(config)
    assert len(fingerprint) == 64
    assert tokenizer_fingerprint(load_policy_config(own_dir)) == fingerprint
    other_weights = make_test_policy_dir(tmp_path / "other", seed=9)
    assert tokenizer_fingerprint(load_policy_config(other_weights)) == fingerprint

    config.fast_skip_tokens = 1
    assert tokenizer_fingerprint(config) != fingerprint
    fit_action_tokenizer(smooth_chunks(200, seed=0), own_dir / ACTION_TOKENIZER, scale=5.0)
    assert tokenizer_fingerprint(load_policy_config(own_dir)) != fingerprint


def test_fingerprint_ignores_padding_of_a_used_tokenizer(own_dir):
    config = load_policy_config(own_dir)
    fingerprint = tokenizer_fingerprint(config)
    policy = load_policy(config, own_dir)
    policy._paligemma_tokenizer("Press", padding="max_length", truncation=True, max_length=7)
    text = json.loads(policy._paligemma_tokenizer.backend_tokenizer.to_str())
    assert text["padding"] is not None
    file = own_dir / TEXT_TOKENIZER / "tokenizer.json"
    stored = json.loads(file.read_text()) | {"padding": text["padding"], "truncation": text["truncation"]}
    file.write_text(json.dumps(stored))
    assert tokenizer_fingerprint(config) == fingerprint
