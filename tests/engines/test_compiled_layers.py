"""Compiled layers compute the same. On ranks: `tests/distributed/test_compiled_engines.py`."""

import sysconfig

import pytest
import torch
from torch._dynamo.utils import counters

from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.engines.compiled_layers import check_compile, compile_layers_, refuse_zero3
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.policies import make_test_policy_dir, random_batch

TOLERANCE = 1e-5
BATCHES = ((0, 3), (1, 3), (2, 4))
"""Seed, and so the lengths, and number of samples."""


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return make_test_policy_dir(tmp_path_factory.mktemp("policy") / "policy")


def passes(policy_dir, *, compiled: bool, recompute: bool = False):
    """Loss and gradients of each batch, and the graphs that were compiled."""
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir).train()
    if compiled:
        compile_layers_(policy)
    if recompute:
        checkpoint_activations(policy)
    counters.clear()
    found = []
    for seed, samples in BATCHES:
        policy.zero_grad()
        loss = token_loss(policy, random_batch(config, samples, seed)).total
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters()}))
    return found, counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def eager(policy_dir):
    return passes(policy_dir, compiled=False)[0]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.sample(0))])
def test_loss_and_gradients_are_those_of_eager_layers(inductor, policy_dir, eager, recompute):
    check_compile(load_policy_config(policy_dir))
    found, graphs = passes(policy_dir, compiled=True, recompute=recompute)
    assert graphs == 3  # layers of the decoder, its last one, and layers of the encoder; for all lengths
    for (loss, gradients), (expected_loss, expected) in zip(found, eager, strict=True):
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert gradients.keys() == expected.keys()
        total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            # Some gradients of the attention are zero except for rounding.
            allowed = TOLERANCE * max(gradient.norm(), 1e-3 * total)
            assert (gradients[name] - gradient).norm() <= allowed, name


def test_names_and_weights_are_those_of_before(policy_dir):
    policy = load_policy(load_policy_config(policy_dir), policy_dir)
    before = policy.state_dict()
    compile_layers_(policy)
    assert list(policy.state_dict()) == list(before)
    assert [name for name, _ in policy.named_parameters()] == list(before)


def test_only_passes_with_gradients_are_compiled(policy_dir, monkeypatch):
    calls = []

    def counted(function, **options):
        assert options == {"dynamic": True, "fullgraph": True}

        def run(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr("craft_ds.engines.compiled_layers.torch.compile", counted)
    config = load_policy_config(policy_dir)
    policy = load_policy(config, policy_dir)
    compile_layers_(policy)
    batch = random_batch(config, 2, seed=0)
    with torch.no_grad():
        token_loss(policy, batch)
    assert calls == []
    token_loss(policy, batch)
    assert len(calls) == config.text_depth + config.vision_depth


def test_a_machine_without_a_compiler_is_refused(policy_dir, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and no-such-compiler is not installed: "):
        check_compile(load_policy_config(policy_dir))


def test_a_machine_without_headers_is_refused(policy_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"needs Python's headers, and .*/Python\.h does not exist: install"):
        check_compile(load_policy_config(policy_dir))


def test_other_policies_are_refused():
    from lerobot.policies.act.configuration_act import ACTConfig

    with pytest.raises(UserError, match="compiles the layers of pi0_fast, not those of act"):
        check_compile(ACTConfig(device="cpu"))


def test_zero3_is_refused():
    refuse_zero3({"zero_optimization": {"stage": 2}})
    with pytest.raises(UserError, match=r"--engine\.compile=true does not work with ZeRO-3"):
        refuse_zero3({"zero_optimization": {"stage": 3}})
