"""Inputs of a simulated pass: the policy without weights, its units, and batches without values."""

from dataclasses import dataclass, replace

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoProcessor, AutoTokenizer

from craft_ds.errors import UserError
from craft_ds.policies.meta_init import build_on_meta
from craft_ds.policies.replace_attribute import replace_attribute
from craft_ds.policies.wrapping import ends_forward, only_looks_up


@dataclass(frozen=True)
class Workload:
    """Sizes of one micro-batch.

    Attributes:
        batch_size: Number of samples.
        prompt_length: Prompt tokens of the longest sample, the state included.
        action_length: Action tokens of the longest sample; all but the first are supervised.
        cameras: Images per sample; None: as many as the policy has.
    """

    batch_size: int = 8
    prompt_length: int = 80
    action_length: int = 100
    cameras: int | None = None


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together.

    Attributes:
        name: Name of the module; empty for parameters that belong to no unit.
        trainable_sizes: Number of elements of each trainable parameter.
        frozen_sizes: Number of elements of each frozen parameter.
        ends_forward: The backward pass needs it next.
        only_looks_up: The backward pass does not read its parameters.
    """

    name: str
    trainable_sizes: tuple[int, ...]
    frozen_sizes: tuple[int, ...] = ()
    ends_forward: bool = False
    only_looks_up: bool = False

    @property
    def trainable(self) -> int:
        """Number of trainable elements."""
        return sum(self.trainable_sizes)

    @property
    def frozen(self) -> int:
        """Number of frozen elements."""
        return sum(self.frozen_sizes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.trainable + self.frozen

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return self.trainable_sizes + self.frozen_sizes


def meta_policy_without_tokenizers(config: PreTrainedConfig) -> PreTrainedPolicy:
    """Build a policy on the meta device without tokenizers: it can compute its loss but not act.

    Raises:
        UserError: The policy cannot be built, for example because it fetches a part from the hub.
    """
    if not isinstance(config, PI0FastConfig):
        try:
            return build_on_meta(config)
        except Exception as error:
            raise UserError(
                f"cannot build a policy of type {config.type} without weights: {error}"
            ) from error

    class NoTokenizer:
        vocab_size = getattr(config, "vocab_size", None)

    def no_tokenizer(*args: object, **kwargs: object) -> NoTokenizer:
        return NoTokenizer()

    with (
        replace_attribute(AutoTokenizer, "from_pretrained", no_tokenizer),
        replace_attribute(AutoProcessor, "from_pretrained", no_tokenizer),
    ):
        return build_on_meta(config)


def describe(policy: nn.Module, units: list[nn.Module]) -> tuple[Unit, ...]:
    """Return the policy's parameters by unit; the last entry holds those that belong to no unit."""
    names = {id(module): name for name, module in policy.named_modules()}
    seen: set[int] = set()

    def unit(name: str, module: nn.Module) -> Unit:
        parameters = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in parameters)
        trainable, frozen = (
            tuple(p.numel() for p in parameters if p.requires_grad == trains) for trains in (True, False)
        )
        return Unit(name, trainable, frozen, ends_forward(policy, module), only_looks_up(module))

    described = [unit(names[id(module)], module) for module in units]
    return (*described, unit("", policy))


def to_fake_(policy: nn.Module, trainable: torch.dtype, frozen: torch.dtype) -> None:
    """Replace parameters and buffers by fake tensors, in the dtypes that forward uses."""
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = trainable if parameter.requires_grad else frozen
                empty = torch.empty(parameter.shape, dtype=kind)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def with_cameras(config: PI0FastConfig, cameras: int | None) -> PI0FastConfig:
    """Return the configuration with this number of cameras, on the CPU, uncompiled and not checkpointed."""
    others = {k: v for k, v in (config.input_features or {}).items() if v.type is not FeatureType.VISUAL}
    count = cameras if cameras is not None else max(len(config.image_features), 1)
    image = PolicyFeature(FeatureType.VISUAL, (3, *config.image_resolution))
    images = {f"observation.images.camera{i}": image for i in range(count)}
    features = {
        "input_features": images | others,
        "output_features": config.output_features or {"action": PolicyFeature(FeatureType.ACTION, (7,))},
    }
    return replace(config, **features, device="cpu", gradient_checkpointing=False, compile_model=False)


def fake_batch(config: PI0FastConfig, workload: Workload, fake: FakeTensorMode) -> dict[str, Tensor]:
    """Create a batch of fake images and tokens. Masks determine shapes and are therefore real."""
    count, prompt, action = workload.batch_size, workload.prompt_length, workload.action_length
    with fake:
        batch = {
            name: torch.empty(count, *feature.shape) for name, feature in config.image_features.items()
        } | {
            OBS_LANGUAGE_TOKENS: torch.zeros(count, prompt, dtype=torch.long),
            ACTION_TOKENS: torch.zeros(count, action, dtype=torch.long),
        }
    return batch | {
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(count, prompt, dtype=torch.bool),
        ACTION_TOKEN_MASK: torch.ones(count, action, dtype=torch.bool),
    }
