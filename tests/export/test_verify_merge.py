"""Comparison of a merged policy with its adapters: the samples, the measure and the bounds."""

import json
import shutil
import weakref

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION_TOKEN_MASK, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from safetensors.torch import load_file, save_file

from craft_ds.errors import UserError
from craft_ds.export import verify_merge as verify_module
from craft_ds.export.comparison_samples import draw_samples
from craft_ds.export.export import export_checkpoint
from craft_ds.export.verify_merge import (
    MAX_LOGIT_DIFFERENCE,
    MAX_TOKEN_DIFFERENCE,
    Outputs,
    check_comparable,
    compare,
    policy_outputs,
    verify_merge,
)
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.testing.policies import random_batch

pytestmark = pytest.mark.slow  # merges one policy of each kind of adapter

CAMERA = "observation.images.top"


@pytest.fixture(scope="module")
def merged(adapted, tmp_path_factory):
    """The fp32 merge of a checkpoint by the kind of its adapters, each made once."""
    root = tmp_path_factory.mktemp("merged")

    def export(kind):
        if not (root / kind).exists():
            export_checkpoint(adapted(kind), root / kind, merge_lora=True)
        return root / kind

    return export


def outputs(directory, batches):
    config = load_policy_config(directory)
    return policy_outputs(load_trained_policy(config, directory), batches)


@pytest.mark.parametrize("kind", ["attention", "attention_mlp_vision", "rslora", "dora", "modules_to_save"])
def test_an_fp32_merge_equals_its_adapters_and_not_its_base(adapted, merged, inputs, kind):
    batches = [random_batch(load_policy_config(inputs.policy), 4, seed=seed) for seed in range(3)]
    expected, base = outputs(adapted(kind), batches), outputs(inputs.policy, batches)
    found = compare(expected, outputs(merged(kind), batches))
    assert found.logit_difference <= 1e-5 * found.largest_logit
    assert (found.different_tokens, found.samples) == (0, 12)
    trained = compare(expected, base)
    assert trained.logit_difference > 0.05 * trained.largest_logit
    assert trained.different_samples > 6


def test_differences_count_up_to_the_end_of_the_longer_action():
    one = torch.tensor([[5, 6, 7, 0, 0], [5, 0, 7, 0, 0], [5, 6, 7, 8, 9]])
    other = torch.tensor([[5, 6, 7, 0, 0], [5, 0, 7, 8, 0], [5, 6, 6, 0, 0]])
    logits = torch.tensor([[1.0, -8.0]])
    found = compare(Outputs(logits, one), Outputs(logits + torch.tensor([0.0, 0.5]), other))
    assert found == (0.5, 8.0, 3 + 4 + 5, 1 + 3, 3, 2)
    assert found.token_difference == pytest.approx(1 / 3)
    assert "4 of 12 action tokens differ (33.33%), in 2 of 3 samples" in found.describe()
    assert compare(Outputs(logits, other), Outputs(logits, one))[2:] == found[2:]


@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_logits_are_refused(side):
    tokens = torch.ones(1, 2, dtype=torch.int64)
    both = [Outputs(torch.ones(1, 2), tokens), Outputs(torch.ones(1, 2), tokens)]
    both[side].logits[0, 1] = torch.nan
    with pytest.raises(UserError, match=f"{('with adapters', 'merged policy')[side]} has non-finite logits"):
        compare(*both)


def test_only_one_model_is_in_memory_at_a_time(adapted, merged, monkeypatch):
    loaded = []

    def watched(*args):
        assert all(model() is None for model in loaded)
        policy = load_trained_policy(*args)
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(verify_module, "load_trained_policy", watched)
    verify_merge(adapted("dora"), merged("dora"), dtype="float32")
    assert len(loaded) == 2


def checkpoint_of(adapted, tmp_path, kind, **changes):
    """Copy a checkpoint and change the data set or the anchors of its run."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(adapted(kind), directory)
    run = json.loads((directory / "train_config.json").read_text())
    for name, value in changes.items():
        section, field = name.split("__")
        run[section][field] = str(value)
    (directory / "train_config.json").write_text(json.dumps(run))
    return directory


def test_frames_and_anchors_of_the_run_are_compared(adapted, inputs):
    checkpoint = adapted("anchors")
    samples = draw_samples(checkpoint, load_policy_config(checkpoint))
    assert samples.origin == f"16 frames of craft-ds/test and 16 anchors of {inputs.anchors}"
    assert [len(batch[OBS_LANGUAGE_TOKENS]) for batch in samples.batches] == [8, 8, 8, 8]
    frames, anchors = samples.batches[:2], samples.batches[2:]
    # The new data has one task and the anchors two, so their prompts differ in length.
    assert len({int(n) for batch in anchors for n in batch[OBS_LANGUAGE_ATTENTION_MASK].sum(1)}) > 1
    for batch in (*frames, *anchors):
        images = batch[CAMERA]
        assert images.shape[1:] == (3, 64, 64)
        assert images.dtype == torch.float32
        assert torch.equal(images, (images * 255).round() / 255)
        assert images.max() > 0.5
        assert batch[ACTION_TOKEN_MASK].any(dim=1).all()
    images = torch.cat([batch[CAMERA] for batch in samples.batches])
    assert len(images.flatten(1).unique(dim=0)) == 32


def test_without_anchors_all_samples_are_frames(adapted):
    checkpoint = adapted("attention_mlp")
    samples = draw_samples(checkpoint, load_policy_config(checkpoint))
    assert samples.origin == "32 frames of craft-ds/test"
    assert sum(len(batch[OBS_LANGUAGE_TOKENS]) for batch in samples.batches) == 32


def test_without_data_all_samples_are_anchors(adapted, inputs, tmp_path):
    checkpoint = checkpoint_of(adapted, tmp_path, "anchors", dataset__root=tmp_path / "gone")
    samples = draw_samples(checkpoint, load_policy_config(checkpoint))
    assert samples.origin == f"24 anchors of {inputs.anchors}"
    assert [len(batch[OBS_LANGUAGE_TOKENS]) for batch in samples.batches] == [8, 8, 8]


def test_without_data_and_anchors_samples_are_synthetic(adapted, merged, inputs, tmp_path):
    gone = {"dataset__root": tmp_path / "gone", "craft__anchor_cache_dir": tmp_path / "gone"}
    checkpoint = checkpoint_of(adapted, tmp_path, "anchors", **gone)
    config = load_policy_config(checkpoint)
    samples = draw_samples(checkpoint, config)
    assert samples.origin == "32 synthetic samples (the run's data set and anchors cannot be opened)"
    tokens = torch.cat([batch[OBS_LANGUAGE_TOKENS] for batch in samples.batches])
    assert 0 <= tokens.min() < tokens.max() < config.vocab_size
    assert len(tokens.unique(dim=0)) == 32
    again = draw_samples(checkpoint, config)
    assert all(torch.equal(a[CAMERA], b[CAMERA]) for a, b in zip(samples.batches, again.batches, strict=True))
    summary = verify_merge(checkpoint, merged("anchors"), dtype="float32")
    assert summary.startswith(f"merged, and compared with the adapters on {samples.origin}: largest logit")


@pytest.mark.parametrize("broken", ["an anchor shard", "a data set of another robot"])
def test_a_source_that_does_not_open_is_skipped(adapted, inputs, tmp_path, broken):
    if broken == "an anchor shard":
        shutil.copytree(inputs.anchors, tmp_path / "anchors")
        next((tmp_path / "anchors").glob("shard_*")).unlink()
        checkpoint = checkpoint_of(adapted, tmp_path, "anchors", craft__anchor_cache_dir=tmp_path / "anchors")
        expected = "32 frames of craft-ds/test"
    else:
        from craft_ds.testing.datasets import make_test_dataset

        make_test_dataset(tmp_path / "other", tasks=1, episodes_per_task=1, state_dim=3)
        checkpoint = checkpoint_of(adapted, tmp_path, "anchors", dataset__root=tmp_path / "other")
        expected = f"24 anchors of {inputs.anchors}"
    assert draw_samples(checkpoint, load_policy_config(checkpoint)).origin == expected


def corrupted(directory, tmp_path, amount=1.0):
    """Copy the merged policy and scale one of its tensors."""
    shutil.copytree(directory, tmp_path / "corrupted")
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.v_proj.weight"))
    weights[name] *= 1 - amount
    save_file(weights, tmp_path / "corrupted" / "model.safetensors", {"format": "pt"})
    return tmp_path / "corrupted"


def test_tokens_beyond_the_bound_are_refused(adapted, merged, tmp_path):
    wrong = corrupted(merged("attention_mlp"), tmp_path, -20.0)
    with pytest.raises(UserError, match=r"the merged policy in float32 .* action tokens differ"):
        verify_merge(adapted("attention_mlp"), wrong, dtype="float32")


def test_the_bound_is_the_given_one_or_that_of_the_dtype(adapted, merged, monkeypatch):
    found = verify_module.Comparison(0.01, 10.0, 100, 7, 32, 2)
    monkeypatch.setattr(verify_module, "compare", lambda *_: found)
    both = adapted("attention_mlp"), merged("attention_mlp")
    assert "7 of 100" in verify_merge(*both, dtype="bfloat16")
    assert "7 of 100" in verify_merge(*both, dtype="float16", max_token_difference=0.07)
    for dtype, asked, stated in (
        ("float16", None, "0.05"),
        ("bfloat16", 0.069, "0.069"),
        ("float32", None, "0"),
    ):
        advice = "export again" if dtype == "float32" else "export with --dtype float32"
        with pytest.raises(
            UserError, match=f"7 of 100 .*--max_token_difference is {stated}: {advice}, or raise"
        ):
            verify_merge(*both, dtype=dtype, max_token_difference=asked)
    assert MAX_TOKEN_DIFFERENCE["float32"] == 0


def test_a_wrong_merge_with_equal_tokens_is_refused_by_logits(adapted, merged, tmp_path):
    wrong = corrupted(merged("attention_mlp"), tmp_path, 0.02)
    with pytest.raises(
        UserError, match=r"rounding explains at most 0\.001 of the largest logit: export again"
    ):
        verify_merge(adapted("attention_mlp"), wrong, dtype="float32", max_token_difference=1.0)
    assert (
        MAX_LOGIT_DIFFERENCE["float32"] < MAX_LOGIT_DIFFERENCE["float16"] < MAX_LOGIT_DIFFERENCE["bfloat16"]
    )


def test_a_policy_without_action_tokens_is_refused():
    config = PreTrainedConfig.get_choice_class("act")(device="cpu")
    with pytest.raises(UserError, match="a policy of type act has none: export without it"):
        check_comparable(config)


def test_a_bf16_policy_is_compared_in_fp32(inputs, tmp_path):
    """The policy's own dtype would round activations and hide errors of the merge."""
    config = load_policy_config(inputs.policy)
    config.dtype = "bfloat16"
    in_fp32 = verify_module.in_fp32(config)
    assert {p.dtype for p in load_policy(in_fp32, inputs.policy).parameters()} == {torch.float32}
    assert config.dtype == "bfloat16"
