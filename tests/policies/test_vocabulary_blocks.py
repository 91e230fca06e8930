"""Log-probabilities in blocks of the vocabulary, against PyTorch's of all logits at once."""

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.pi0_fast import vocabulary_blocks
from craft_ds.policies.pi0_fast.vocabulary_blocks import token_log_probs

POSITIONS, WIDTH, VOCABULARY = 40, 24, 500
BLOCKS = {"one": 1 << 24, "three": 200 * POSITIONS, "many": 8 * POSITIONS}


@pytest.fixture(autouse=True, params=["three"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(vocabulary_blocks, "_LARGEST", BLOCKS[request.param])


def reference(head, hidden, ids):
    logits = head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1).gather(1, ids)


def inputs(dtype=torch.float32, count=3, sharpness=1.0):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    hidden = sharpness * torch.randn(POSITIONS, WIDTH, generator=generator)
    ids = torch.rand(POSITIONS, VOCABULARY, generator=generator).topk(count, dim=1).indices
    return head.to(dtype), hidden.to(dtype).requires_grad_(), ids


def outcome(call, head, hidden, ids):
    """Return the log-probabilities and the gradients of a weighted sum, in fp64."""
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    head.zero_grad()
    hidden.grad = None
    values = call(head, hidden, ids)
    (values * weights).sum().backward()
    return [found.detach().double() for found in (values, hidden.grad, head.weight.grad)]


def distances(found, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("blocks", BLOCKS, indirect=True)
@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("sharpness", [0.1, 1.0])
def test_is_exact_in_fp32(count, sharpness):
    """Beside the error that PyTorch's own fp32 has, which fp64 shows."""
    parts = inputs(count=count, sharpness=sharpness)
    head, hidden, ids = parts
    found, torchs = outcome(token_log_probs, *parts), outcome(reference, *parts)
    values, *gradients = distances(found, torchs)
    assert values <= 1e-6
    assert max(gradients) <= 5e-7
    exact = outcome(reference, head.double(), hidden.detach().double().requires_grad_(), ids)
    for ours, theirs in zip(distances(found, exact), distances(torchs, exact), strict=True):
        assert ours <= 2 * theirs


def test_is_exact_in_fp64():
    parts = inputs(torch.float64)
    found = outcome(token_log_probs, *parts)
    assert token_log_probs(*parts).dtype == torch.float64
    assert max(distances(found, outcome(reference, *parts))) <= 1e-14


@pytest.mark.parametrize("autocast", [False, True])
def test_is_as_good_as_torch_in_bf16(autocast):
    def under(call):
        def casts(*parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                values = call(*parts)
            assert values.dtype == torch.float32
            return values

        return casts

    head, hidden, ids = inputs(torch.bfloat16)
    exact = outcome(reference, head.double(), hidden.detach().double().requires_grad_(), ids)
    head, hidden, _ = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():  # the same rounded numbers, in fp32
        head.weight.copy_(head.weight.bfloat16())
        hidden.copy_(hidden.bfloat16())
    found, torchs = (outcome(under(call), head, hidden, ids) for call in (token_log_probs, reference))
    assert head.weight.grad.dtype == head.weight.dtype
    for ours, theirs in zip(distances(found, exact), distances(torchs, exact), strict=True):
        assert 0 < ours <= 1.1 * theirs


def test_a_certain_token_keeps_its_small_loss():
    """Subtracting the logarithm of the sum from large logits would leave rounding only."""
    head, hidden, _ = inputs(sharpness=100.0)
    ids = head(hidden).argmax(dim=1, keepdim=True)
    exact = reference(head.double(), hidden.double(), ids)
    found = token_log_probs(head.float(), hidden, ids).double()
    torchs = reference(head, hidden, ids).double()
    assert (found - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_nothing_frozen_gets_a_gradient(frozen):
    head, hidden, ids = inputs()
    expected = outcome(reference, head, hidden, ids)[1:]
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    (head.weight if frozen == "head" else hidden).grad = None
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    trained, other = (hidden, head.weight) if frozen == "head" else (head.weight, hidden)
    trained.grad = None
    (token_log_probs(head, hidden, ids) * weights).sum().backward()
    assert other.grad is None
    assert distances([trained.grad.double()], [expected[frozen == "hidden"]])[0] <= 5e-7


def test_a_tied_embedding_gets_both_gradients():
    head, _, ids = inputs()
    embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=head.weight)
    embedding.weight = head.weight
    found = []
    for call in (token_log_probs, reference):
        head.zero_grad()
        call(head, embedding(ids[:, 0]), ids).sum().backward()
        found.append(head.weight.grad.double())
    assert distances(found[:1], found[1:])[0] <= 5e-7


def test_a_head_with_adapters_counts_them():
    head, hidden, ids = inputs()
    model = nn.ModuleDict({"head": head})
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["head"], r=2, init_lora_weights=False), model
    )
    adapted = model["head"]
    assert torch.equal(token_log_probs(adapted, hidden, ids), reference(adapted, hidden, ids))
    assert not torch.allclose(token_log_probs(adapted, hidden, ids), reference(head, hidden, ids))


def test_the_head_is_called_and_keeps_its_forward():
    head, hidden, ids = inputs()
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    token_log_probs(head, hidden, ids)
    assert calls == ["before", "after"]
    with pytest.raises(RuntimeError):
        token_log_probs(head, hidden[:, 1:], ids)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("blocks", ["one"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_a_tenth_of_the_memory_at_real_widths(dtype):
    """Beside the weight's own gradient; pi0_fast's width and vocabulary, 8 samples of 256 action tokens."""

    def peak(call):
        with FakeTensorMode():
            head = nn.Linear(2048, 257_152, bias=False, dtype=dtype)
            hidden = torch.empty(8 * 255, 2048, dtype=dtype, requires_grad=True)
            ids = torch.zeros(8 * 255, 1, dtype=torch.long)
            with MemoryCounter() as counter:
                call(head, hidden, ids).sum().backward()
        return counter.peak - head.weight.numel() * dtype.itemsize

    assert peak(token_log_probs) <= 0.1 * peak(reference)
