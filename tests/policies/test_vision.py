"""Cost of a frozen vision tower, and features instead of images."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from craft_ds.errors import UserError
from craft_ds.policies.loading import build_policy, load_policy, load_policy_config
from craft_ds.policies.pi0_fast.generation import greedy_action_tokens
from craft_ds.policies.pi0_fast.vision import (
    feature_shape,
    features_key,
    image_tokens,
    tower_trains,
    vision_features,
    vision_fingerprint,
    vision_tower,
)
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.weights import WeightReader
from craft_ds.testing.policies import make_test_policy_dir, random_batch

TOWER = "model.paligemma_with_expert.paligemma.model.vision_tower."
SIDE = "observation.images.side1"


@pytest.fixture(params=[1, 2], ids=["one_camera", "two_cameras"])
def policy(request, tmp_path_factory):
    path = make_test_policy_dir(tmp_path_factory.mktemp("policy"), seed=1, cameras=request.param)
    return load_policy(load_policy_config(path), path)


two_cameras = pytest.mark.parametrize("policy", [2], indirect=True)


@pytest.fixture
def batch(policy):
    return random_batch(policy.config, 4, seed=0)


def freeze(policy):
    vision_tower(policy).requires_grad_(False)
    return policy


def with_features(policy, batch, dtype):
    """The batch with features in the place of its images, kept in a dtype."""
    features = {key: value.to(dtype) for key, value in vision_features(policy, batch).items()}
    return {key: value for key, value in batch.items() if key not in policy.config.image_features} | features


def loss_and_gradients(policy, batch):
    policy.zero_grad()
    loss = token_loss(policy, batch).total
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def cosine(gradients, expected):
    assert gradients.keys() == expected.keys()
    one, other = (torch.cat([g.double().flatten() for g in gs.values()]) for gs in (gradients, expected))
    return torch.dot(one, other).item() / (one.norm() * other.norm()).item()


def tower_calls(policy, action):
    calls = []
    hook = vision_tower(policy).register_forward_pre_hook(lambda *_: calls.append(1))
    action()
    hook.remove()
    return len(calls)


def kept(action):
    """Return the number of tensors that an action's graph keeps, and their elements."""
    sizes = []
    with saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
        action()
    return len(sizes), sum(sizes)


# --- a frozen tower ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_tokens_are_lerobots_to_the_bit(policy, batch, frozen):
    if frozen:
        freeze(policy)
    images, masks = policy._preprocess_images(batch)
    expected = policy.model.paligemma_with_expert.embed_image(torch.cat(images)).chunk(len(images))
    tokens, found_masks = image_tokens(policy, batch)
    assert torch.equal(tokens, torch.cat(expected, dim=1))
    assert all(map(torch.equal, found_masks, masks))
    assert tokens.requires_grad  # the projector trains


def test_no_graph_is_kept_for_a_frozen_tower(policy, batch):
    trainable = kept(lambda: image_tokens(policy, batch))
    freeze(policy)
    frozen = kept(lambda: image_tokens(policy, batch))
    without_tower = kept(lambda: image_tokens(policy, with_features(policy, batch, torch.float32)))
    assert frozen == without_tower
    assert trainable[0] > 10 * frozen[0]
    assert trainable[1] > 10 * frozen[1]


def test_nor_where_something_before_it_asks_for_a_gradient(policy, batch):
    freeze(policy)
    expected = kept(lambda: image_tokens(policy, batch))
    batch["observation.images.top"].requires_grad_()
    assert kept(lambda: image_tokens(policy, batch)) == expected


def test_the_other_gradients_are_those_of_a_trainable_tower(policy, batch):
    loss, gradients = loss_and_gradients(policy, batch)
    frozen_loss, frozen_gradients = loss_and_gradients(freeze(policy), batch)
    assert frozen_loss == loss
    assert frozen_gradients.keys() == {name for name in gradients if not name.startswith(TOWER)}
    assert any("multi_modal_projector" in name for name in frozen_gradients)
    for name, gradient in frozen_gradients.items():
        assert torch.equal(gradient, gradients[name]), name


def test_a_tower_trains_if_any_of_it_does(policy, batch):
    assert tower_trains(policy)
    bias = freeze(policy).get_parameter(f"{TOWER}vision_model.encoder.layers.0.mlp.fc1.bias")
    assert not tower_trains(policy)
    bias.requires_grad_()
    assert tower_trains(policy)
    _, gradients = loss_and_gradients(policy, batch)
    assert gradients[f"{TOWER}vision_model.encoder.layers.0.mlp.fc1.bias"].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradient_checkpointing_changes_nothing(policy, batch, frozen):
    if frozen:
        freeze(policy)
    policy.train()
    loss, gradients = loss_and_gradients(policy, batch)
    policy.model.gradient_checkpointing_enable()
    passes = tower_calls(policy, lambda: loss_and_gradients(policy, batch))
    again, found = loss_and_gradients(policy, batch)
    assert passes == (1 if frozen else 2)  # what trains is computed again, what does not is not
    assert again == pytest.approx(loss, rel=1e-6)
    assert cosine(found, gradients) == pytest.approx(1.0, abs=1e-9)


# --- features in the place of images ----------------------------------------------------------------------


def test_the_tower_is_not_called(policy, batch):
    freeze(policy)
    stored = with_features(policy, batch, torch.float16)
    assert tower_calls(policy, lambda: token_loss(policy, batch)) == 1
    assert tower_calls(policy, lambda: token_loss(policy, stored)) == 0
    assert tower_calls(policy, lambda: greedy_action_tokens(policy, stored)) == 0
    assert {tuple(stored[features_key(name)].shape[1:]) for name in policy.config.image_features} == {
        feature_shape(policy)
    }


def test_fp32_features_give_the_loss_and_gradient_of_the_images(policy, batch):
    freeze(policy)
    loss, gradients = loss_and_gradients(policy, batch)
    stored_loss, stored = loss_and_gradients(policy, with_features(policy, batch, torch.float32))
    assert stored_loss == pytest.approx(loss, rel=1e-6)
    assert stored.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(stored[name], gradient, rtol=1e-6, atol=1e-8)


def test_features_in_fp16_come_close(policy, batch):
    freeze(policy)
    loss, gradients = loss_and_gradients(policy, batch)
    stored_loss, stored = loss_and_gradients(policy, with_features(policy, batch, torch.float16))
    assert stored_loss != loss  # rounded they are
    assert stored_loss == pytest.approx(loss, rel=2e-3)
    assert cosine(stored, gradients) > 0.999


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_features_in_bf16_training(policy, batch, how):
    """Weights gathered in bf16, and fp32 weights that autocast casts."""
    freeze(policy)
    stored = with_features(policy, batch, torch.float16)
    if how == "weights":
        policy.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, found = token_loss(policy, batch).total, token_loss(policy, stored).total
    assert found.item() == pytest.approx(loss.item(), rel=1e-2)


@two_cameras
def test_a_missing_camera_is_masked(policy, batch):
    freeze(policy)
    complete = token_loss(policy, batch).total.item()
    del batch[SIDE]
    stored = with_features(policy, batch, torch.float32)
    assert features_key(SIDE) not in stored
    loss, gradients = loss_and_gradients(policy, batch)
    stored_loss, found = loss_and_gradients(policy, stored)
    assert abs(loss / complete - 1) > 1e-5
    assert stored_loss == pytest.approx(loss, rel=1e-6)
    assert cosine(found, gradients) == pytest.approx(1.0, abs=1e-9)
    tokens = greedy_action_tokens(policy, batch)
    assert torch.equal(greedy_action_tokens(policy, stored), tokens)


@two_cameras
def test_images_mixed_with_features_are_refused(policy, batch):
    batch |= vision_features(policy, {SIDE: batch[SIDE]})
    del batch[SIDE]
    with pytest.raises(ValueError, match=r"images of observation\.images\.top"):
        token_loss(policy, batch)


def test_acting_on_features(policy, batch):
    tokens = greedy_action_tokens(policy, batch)
    assert len(tokens.unique(dim=0)) > 1
    assert torch.equal(greedy_action_tokens(policy, with_features(policy, batch, torch.float32)), tokens)


# --- whose features they are ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("fingerprint") / "policy")


@pytest.fixture
def directory(original, tmp_path):
    """A copy to change."""
    return shutil.copytree(original, tmp_path / "policy")


def fingerprint(directory):
    policy = build_policy(load_policy_config(directory), directory)
    with WeightReader(directory, policy) as weights:
        return vision_fingerprint(policy, weights)


def change(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_one_changed_weight_of_the_tower_changes_the_fingerprint(original, directory):
    assert fingerprint(directory) == fingerprint(original)

    def edit(tensors):
        bias = tensors[f"{TOWER}vision_model.post_layernorm.bias"]
        bias[-1] = torch.nextafter(bias[-1], bias[-1] + 1)

    change(directory, edit)
    assert fingerprint(directory) != fingerprint(original)


def test_what_is_not_the_tower_does_not(original, directory):
    def edit(tensors):
        for name, tensor in tensors.items():
            if not name.startswith(TOWER):
                tensor += 1

    change(directory, edit)
    assert fingerprint(directory) == fingerprint(original)


@pytest.mark.parametrize("setting", [{"vision_heads": 4}, {"image_resolution": [80, 80], "vision_patch": 16}])
def test_what_else_decides_the_features_does(original, directory, setting):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    if "image_resolution" in setting:
        # Another count of patches has other position embeddings.
        key = f"{TOWER}vision_model.embeddings.position_embedding.weight"
        change(directory, lambda tensors: tensors.update({key: torch.zeros(25, 32)}))
    assert fingerprint(directory) != fingerprint(original)


def test_the_same_values_in_another_dtype_are_the_same_tower(original, directory):
    def round_to(dtype):
        return lambda tensors: tensors.update({name: t.bfloat16().to(dtype) for name, t in tensors.items()})

    change(directory, round_to(torch.float32))
    rounded = fingerprint(directory)
    change(directory, round_to(torch.bfloat16))
    assert fingerprint(directory) == rounded
    assert rounded != fingerprint(original)


def test_other_policies_have_no_such_features():
    with pytest.raises(UserError, match="Linear: omit --vision_features"):
        vision_tower(nn.Linear(1, 1))


@pytest.mark.parametrize("present", [["top"], ["side1"], ["side0", "side1"], ["top", "side1"]])
def test_an_absent_camera_costs_nothing_and_changes_nothing(tmp_path, present):
    """LeRobot embeds an empty image for it and masks the tokens."""
    path = make_test_policy_dir(tmp_path / "policy", seed=1, cameras=3)
    policy = load_policy(load_policy_config(path), path)
    policy.config.input_features["observation.images.side0"] = policy.config.input_features.pop(
        "observation.images.side2"
    )
    batch = random_batch(policy.config, 4, seed=0)
    for camera in policy.config.image_features:
        if camera.rpartition(".")[2] not in present:
            del batch[camera]
    images = []
    hook = vision_tower(policy).register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    loss, gradients = loss_and_gradients(policy, batch)
    hook.remove()
    assert images == [4 * len(present)]

    policy.zero_grad()
    mean, _ = policy.forward(batch)
    tokens = token_loss(policy, batch).count.item()
    mean.backward()
    assert loss / tokens == pytest.approx(mean.item(), rel=1e-6)
    expected = {name: p.grad * tokens for name, p in policy.named_parameters() if p.grad is not None}
    difference = sum((gradients[name] - value).double().square().sum() for name, value in expected.items())
    norm = sum(value.double().square().sum() for value in expected.values())
    assert (difference / norm).sqrt().item() < 1e-6
    assert gradients.keys() == expected.keys()
