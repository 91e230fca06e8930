"""The embedded pi0_fast through LeRobot's own doors."""

from types import FunctionType, SimpleNamespace

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from transformers import AutoTokenizer

from craft_ds.policies.directory import save_policy_directory
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig, TinyPI0FastPolicy, build_tiny_policy
from craft_ds.policies.tiny_pi0_fast.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.policies import TASKS, features, make_test_policy_dir, random_batch, smooth_chunks


def raw_batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation.images.top": torch.rand(size, 3, 64, 64, generator=generator),
        "observation.state": torch.rand(size, 4, generator=generator) - 0.5,
        "action": torch.from_numpy(smooth_chunks(size, seed)) * 0.4,
        "task": [TASKS[i % len(TASKS)] for i in range(size)],
    }


def test_full_size_policy_has_about_a_million_parameters(policy_dir):
    bounds = {"min": -torch.ones(4), "max": torch.ones(4)}
    policy, _, _ = build_tiny_policy(
        features(),
        {"observation.state": bounds, "action": bounds},
        policy_dir / TEXT_TOKENIZER,
        policy_dir / ACTION_TOKENIZER,
        seed=0,
    )
    assert sum(p.numel() for p in policy.parameters()) * 4 < 4e6
    position = policy.model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings
    assert 0.4 < position.position_embedding.weight.std() < 0.6


def test_only_constructors_and_from_pretrained_are_our_own():
    own = {
        name
        for name, value in vars(TinyPI0FastPolicy).items()
        if isinstance(value, FunctionType | classmethod)
    }
    assert own == {"__init__", "from_pretrained"}
    assert TinyPI0FastPolicy.forward is PI0FastPolicy.forward


def test_lerobot_finds_the_class_by_its_type():
    assert get_policy_class("tiny_pi0_fast") is TinyPI0FastPolicy


def test_seed_decides_the_weights_and_spares_the_global_state(policy_dir, tmp_path):
    state = torch.random.get_rng_state()
    same, other = make_test_policy_dir(tmp_path / "a", seed=0), make_test_policy_dir(tmp_path / "b", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    read = [(path / "model.safetensors").read_bytes() for path in (policy_dir, same, other)]
    assert read[0] == read[1] != read[2]


def test_save_and_from_pretrained_keep_every_weight(policy_dir, tmp_path):
    policy = load_policy(load_policy_config(policy_dir), policy_dir)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    policy.save_pretrained(tmp_path)
    again = TinyPI0FastPolicy.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    batch = random_batch(policy.config, 2, seed=0)
    assert policy(batch)[0] == again(batch)[0]


def test_a_moved_directory_loads_its_own_tokenizers(policy_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PreTrainedConfig.from_pretrained(policy_dir)
    assert config.text_tokenizer_name == TEXT_TOKENIZER  # relative in the file
    assert TinyPI0FastPolicy.from_pretrained(policy_dir).config.text_tokenizer_name == str(
        policy_dir / TEXT_TOKENIZER
    )


def test_make_policy_and_processors_as_lerobot_train_makes_them(policy_dir):
    config = TinyPI0FastConfig(
        text_tokenizer_name=str(policy_dir / TEXT_TOKENIZER),
        action_tokenizer_name=str(policy_dir / ACTION_TOKENIZER),
        vocab_size=AutoTokenizer.from_pretrained(policy_dir / TEXT_TOKENIZER).vocab_size,
        device="cpu",
    )
    bounds = {"min": -torch.ones(4), "max": torch.ones(4)}
    stats = {"observation.state": bounds, "action": bounds}
    policy = make_policy(config, ds_meta=SimpleNamespace(features=features(2), stats=stats))
    assert list(policy.config.image_features) == ["observation.images.top", "observation.images.side1"]
    preprocess, _ = make_pre_post_processors(config, dataset_stats=stats)
    batch = preprocess(raw_batch() | {"observation.images.side1": torch.rand(4, 3, 64, 64)})
    loss, _ = policy(batch)
    assert loss.isfinite()


def test_make_policy_and_processors_as_lerobot_eval_makes_them(policy_dir, tmp_path):
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir)
    save_policy_directory(policy, *load_processors(config, policy_dir), tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.pretrained_path = tmp_path
    loaded = make_policy(config, ds_meta=SimpleNamespace(features=features(), stats={}))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))


def test_saved_processors_give_the_same_tokens(policy_dir):
    config = load_policy_config(policy_dir)
    bounds = {"min": -torch.tensor([1.0, 2.0, 1.0, 0.5]), "max": torch.tensor([1.0, 2.0, 3.0, 0.5])}
    fresh, _ = make_pre_post_processors(config, dataset_stats={"observation.state": bounds, "action": bounds})
    saved, _ = load_processors(config, policy_dir)
    ours, theirs = saved(raw_batch()), fresh(raw_batch())
    for key in (ACTION_TOKENS, ACTION_TOKEN_MASK, "observation.language.tokens"):
        assert torch.equal(ours[key], theirs[key])


def test_a_wrong_vocabulary_size_is_refused(policy_dir):
    config = load_policy_config(policy_dir)
    config.vocab_size += 1
    with pytest.raises(ValueError, match="vocab_size"):
        TinyPI0FastPolicy(config)


def test_untrained_select_action_is_finite(policy_dir):
    config = load_policy_config(policy_dir)
    config.validate_action_token_prefix = False
    policy = load_policy(config, policy_dir)
    preprocess, postprocess = load_processors(config, policy_dir)
    observation = preprocess({k: v for k, v in raw_batch(3).items() if k != "action"})
    action = postprocess(policy.select_action(observation))
    assert action.shape == (3, 4)
    assert action.isfinite().all()


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_after_overfitting_greedy_decoding_returns_the_batch(overfitted, use_kv_cache):
    policy, preprocess, postprocess = overfitted
    policy.config.use_kv_cache = use_kv_cache
    raw = raw_batch()
    batch = preprocess(raw)
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (4, 8, 4)
    expected = policy.action_tokenizer.decode(
        policy.action_tokenizer(batch["action"]), time_horizon=8, action_dim=4
    )
    assert torch.allclose(chunk, torch.from_numpy(expected).float(), atol=1e-5)
    policy.reset()
    error = (postprocess(policy.select_action(batch)) - raw["action"][:, 0]).abs().mean()
    assert error < 0.2


@pytest.fixture(scope="module")
def overfitted(policy_dir):
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir).train()
    preprocess, postprocess = load_processors(config, policy_dir)
    batch = preprocess(raw_batch())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = token_loss(policy, batch)
        (loss.total / loss.count).backward()
        optimizer.step()
    assert policy(batch)[0] < 0.1
    return policy, preprocess, postprocess
