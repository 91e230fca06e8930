"""Flags of the policy: what trains is what is saved, or the flag is refused."""

import dataclasses

import pytest
import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS
from torch.utils.data import default_collate

from craft_ds.config.parser import parse_arguments
from craft_ds.data.policy_input import images_to_float
from craft_ds.errors import UserError
from craft_ds.policies.changes import policy_changes, policy_edits
from craft_ds.policies.directory import copy_policy_files
from craft_ds.policies.loading import build_policy, fill_policy_, load_policy_config, load_processors
from craft_ds.policies.statistics import check_statistics
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.policies.weights import WeightReader

pytestmark = pytest.mark.slow

# A value for each field that another value of its type would not do for.
VALUES = {
    "chunk_size": "4 --policy.n_action_steps=4",
    "n_action_steps": "4 --policy.chunk_size=4",
    "paligemma_variant": "gemma_300m",
    "action_expert_variant": "gemma_2b",
    "dtype": "bfloat16",
    "device": "cpu",
    "text_heads": "4",
    "license": "mit",
    "tags": '["a"]',
    "private": "true",
    "push_to_hub": "true",
    "repo_id": "a/b",
    "pretrained_revision": "main",
    "compile_mode": "default",
    "relative_exclude_joints": '["a"]',
    "action_feature_names": '["a", "b", "c", "d"]',
    "rtc_config": '{"enabled": false}',
    "image_resolution": "[32, 32]",
    "optimizer_betas": "[0.8, 0.9]",
    "normalization_mapping": '{"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "IDENTITY"}',
    "max_decoding_steps": "48",
    "temperature": "0.5",
    "input_features": None,  # written by data sets
    "output_features": None,
    "pretrained_path": None,  # another way to write --policy.path
    "text_tokenizer_name": "unknown/tokenizer",
    "action_tokenizer_name": "unknown/tokenizer",
}
# Fields whose other values do not fit the weights, or the tokenizers, of the policy.
MISFITS = {
    "vocab_size",
    "text_width",
    "text_depth",
    "text_mlp_dim",
    "text_heads",
    "vision_width",
    "vision_depth",
    "vision_mlp_dim",
    "vision_heads",
    "vision_patch",
    "image_resolution",
    "text_tokenizer_name",
    "action_tokenizer_name",
}
REFUSED = {
    "n_obs_steps",
    "use_amp",
    "use_peft",
    "push_to_hub",
    "repo_id",
    "private",
    "compile_model",
    "compile_mode",
    "dtype",
    "use_relative_actions",
    "relative_exclude_joints",
    "action_feature_names",
    "max_state_dim",
    "max_action_dim",
    "action_expert_variant",
}
FIELDS = [
    field.name
    for field in dataclasses.fields(TinyPI0FastConfig)
    if field.init and VALUES.get(field.name, "") is not None
]


def other_value(name: str) -> str:
    if name in VALUES:
        return str(VALUES[name])
    default = next(field.default for field in dataclasses.fields(TinyPI0FastConfig) if field.name == name)
    if isinstance(default, bool):
        return str(not default).lower()
    return str(default + 1 if isinstance(default, int) else default * 2)


class Run:
    """The policy of a run with some flags, and the policy that it saves."""

    def __init__(self, inputs, tmp_path, flags, dataset_statistics=None):
        config = parse_arguments([*inputs.flags(tmp_path / "run"), *flags])
        config.validate()
        self.config = config.policy
        changes = policy_changes(
            config.policy,
            load_policy_config(inputs.policy),
            rename_map=config.rename_map,
            statistics=dataset_statistics,
        )
        self.pre, self.post = load_processors(config.policy, inputs.policy, changes=changes)
        self.saved = tmp_path / "saved"
        copy_policy_files(inputs.policy, self.saved, self.saved, policy_edits(changes, self.pre, self.post))
        (self.saved / "model.safetensors").symlink_to(inputs.policy / "model.safetensors")

    def samples(self, root):
        chunk = {ACTION: [step / 10 for step in range(self.config.chunk_size)]}
        dataset = LeRobotDataset("craft-ds/test", root=root, delta_timestamps=chunk, video_backend="pyav")
        return default_collate([dataset[row] for row in (0, 7, 25)])

    def stock(self):
        """What LeRobot alone makes of the saved directory."""
        config = PreTrainedConfig.from_pretrained(self.saved)
        return config, *make_pre_post_processors(config, pretrained_path=str(self.saved))


def decoded(policy, post, batch):
    """The actions that perfect tokens stand for."""
    tokens = torch.where(batch[ACTION_TOKEN_MASK], batch[ACTION_TOKENS], 0)[:, 1:]
    width = policy.config.output_features[ACTION].shape[0]
    return post(policy.detokenize_actions(tokens, policy.config.n_action_steps, width))


def load(run, directory):
    policy = build_policy(run.config, directory)
    with WeightReader(directory, policy) as weights:
        fill_policy_(policy, weights.read, "cpu")


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_saved_as_it_trains_or_refused(inputs, tmp_path, name):
    value, *more = other_value(name).split(" --")
    flags = [f"--policy.{name}={value}", *(f"--{flag}" for flag in more)]
    if name in REFUSED | MISFITS:
        with pytest.raises(UserError) as raised:
            load(Run(inputs, tmp_path, flags), inputs.policy)
        assert "\n" not in str(raised.value)
        assert f"--policy.{name}" in str(raised.value) or name in MISFITS
        return
    run = Run(inputs, tmp_path, flags)
    load(run, inputs.policy)
    config, pre, post = run.stock()
    if name not in ("device", "pretrained_revision"):
        assert getattr(config, name) == getattr(run.config, name)
    ours = run.pre(images_to_float(run.samples(inputs.new)))
    theirs = pre(images_to_float(run.samples(inputs.new)))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]) if isinstance(tensor, torch.Tensor) else tensor == theirs[key]
    action = torch.linspace(-1, 1, 4)[None]
    assert torch.equal(run.post(action), post(action))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--policy.chunk_size=4", "--policy.n_action_steps=4"],
        ["--policy.chunk_size=6", "--policy.n_action_steps=6", "--policy.max_action_tokens=40"],
        ["--policy.fast_skip_tokens=32"],
        ["--policy.max_action_tokens=64", "--policy.tokenizer_max_length=100"],
        [f"--policy.normalization_mapping={VALUES['normalization_mapping']}"],
    ],
)
def test_perfect_tokens_decode_to_the_recorded_actions(inputs, tmp_path, flags):
    run = Run(inputs, tmp_path, flags)
    config, pre, post = run.stock()
    policy = build_policy(load_policy_config(run.saved), run.saved)
    raw = run.samples(inputs.new)
    found = decoded(policy, post, pre(images_to_float(raw)))
    assert found.shape == raw[ACTION].shape
    # FAST rounds coefficients scaled by 4: at most 1/8 in each of the chunk's, in normalised units.
    scale = torch.tensor([1.0, 2.0, 2.0, 0.5]) if "IDENTITY" not in "".join(flags) else torch.ones(4)
    error = (found - raw[ACTION]).abs() / scale
    assert error.mean() < 0.1
    assert config.n_action_steps == config.chunk_size == raw[ACTION].shape[1]


def test_fewer_action_steps_than_the_chunk_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"--policy.n_action_steps=4 and --policy.chunk_size=8"):
        Run(inputs, tmp_path, ["--policy.n_action_steps=4"])


def test_a_rename_map_is_in_the_saved_preprocessor(inputs, tmp_path):
    run = Run(inputs, tmp_path, ['--rename_map={"observation.images.front": "observation.images.top"}'])
    _, pre, _ = run.stock()
    raw = run.samples(inputs.new)
    raw["observation.images.front"] = raw.pop("observation.images.top")
    assert "observation.images.top" in pre(images_to_float(raw))


def test_a_change_of_a_mode_needs_its_statistics(inputs, tmp_path):
    mapping = '{"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "QUANTILES"}'
    run = Run(inputs, tmp_path, [f"--policy.normalization_mapping={mapping}"])
    assert run.config.normalization_mapping["ACTION"] is NormalizationMode.QUANTILES
    with pytest.raises(UserError, match=r"no statistics \(q01, q99\) of action.*--normalization=dataset"):
        check_statistics(inputs.policy, run.config, run.pre, run.post)


def test_nothing_changes_without_flags(inputs, tmp_path):
    run = Run(inputs, tmp_path, ["--policy.optimizer_lr=1e-5"])
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        ours, theirs = (
            (directory / file).read_text().replace(str(directory), "")
            for directory in (run.saved, inputs.policy)
        )
        assert ours.replace("/text_tok", "text_tok").replace("/action_tok", "action_tok") == theirs
