"""Small random policies of LeRobot's other types, with processors, for tests and benchmarks.

LeRobot fixes the sizes of pi0 and pi0.5 to PaliGemma's, and ACT and diffusion use torchvision's ResNet-18;
`small_sizes` shrinks what their constructors build.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from lerobot.policies.act import modeling_act
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.diffusion import modeling_diffusion
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi0 import modeling_pi0, processor_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05, processor_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.smolvla import modeling_smolvla
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import TokenizerProcessorStep
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
)

from craft_ds.policies.replace_attribute import replace_attribute
from craft_ds.policies.tiny_pi0_fast.tokenizers import TEXT_TOKENIZER, build_text_tokenizer
from craft_ds.testing.policies import TASKS, features

OTHER_POLICIES = ("act", "diffusion", "pi0", "pi05", "smolvla")
CHUNK = 8
_VOCABULARY = 700  # more than build_text_tokenizer makes of TASKS
_SIZES = {"gemma_2b": (32, 64), "gemma_300m": (16, 32)}  # width, feed-forward size
_VLM = "vlm"


def make_small_policy_dir(path: str | Path, policy_type: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a complete policy directory of one of `OTHER_POLICIES` with random weights.

    Args:
        path: The folder to write. A smolvla also needs it later: its configuration names `vlm/` in it.
        policy_type: LeRobot's name of the type.
        seed: Seeds the weights.
        **overrides: Fields of the policy's configuration.

    Returns:
        The folder.
    """
    path = Path(path)
    found = dataset_to_policy_features(features())
    fields: dict[str, Any] = {
        "input_features": {key: ft for key, ft in found.items() if key != "action"},
        "output_features": {"action": found["action"]},
        "device": "cpu",
        "push_to_hub": False,
    }
    build_text_tokenizer(TASKS, path / TEXT_TOKENIZER)
    if policy_type == "smolvla":
        _write_vlm(path)
    config = _CONFIGS[policy_type](path, fields | overrides)
    stats = {"mean": torch.zeros(4), "std": torch.ones(4), "min": -torch.ones(4), "max": torch.ones(4)}
    stats |= {"q01": -torch.ones(4), "q99": torch.ones(4)}
    images = {key: torch.full((3, 1, 1), value) for key, value in (("mean", 0.5), ("std", 0.25))}
    images |= {"min": torch.zeros(3, 1, 1), "max": torch.ones(3, 1, 1)}
    tokenizer = str((path / TEXT_TOKENIZER).resolve())

    def tokenize(tokenizer_name: str, **options: Any) -> TokenizerProcessorStep:
        return TokenizerProcessorStep(tokenizer_name=tokenizer, **options)

    with ExitStack() as stack:
        stack.enter_context(small_sizes())
        stack.enter_context(torch.random.fork_rng())
        for module in (processor_pi0, processor_pi05):  # they name PaliGemma's tokenizer
            stack.enter_context(replace_attribute(module, "TokenizerProcessorStep", tokenize))
        torch.manual_seed(seed)
        policy = get_policy_class(policy_type)(config)
        statistics = {"observation.state": stats, "action": stats, "observation.images.top": images}
        preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=statistics)
    policy.save_pretrained(path)
    preprocessor.save_pretrained(path)
    postprocessor.save_pretrained(path)
    return path


def _act(path: Path, fields: dict[str, Any]) -> ACTConfig:
    small = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "latent_dim": 8}
    layers = {"n_encoder_layers": 2, "n_vae_encoder_layers": 1, "dropout": 0.0}
    chunk = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "pretrained_backbone_weights": None}
    return ACTConfig(**(small | layers | chunk | fields))


def _diffusion(path: Path, fields: dict[str, Any]) -> DiffusionConfig:
    small = {"down_dims": (16, 32), "kernel_size": 3, "n_groups": 4, "diffusion_step_embed_dim": 16}
    vision = {"spatial_softmax_num_keypoints": 8, "use_group_norm": True, "pretrained_backbone_weights": None}
    steps = {"horizon": CHUNK, "n_action_steps": 4, "num_inference_steps": 2, "scheduler_warmup_steps": 0}
    return DiffusionConfig(**(small | vision | steps | fields))


def _pi0(path: Path, fields: dict[str, Any]) -> PI0Config:
    return PI0Config(**(_pi(path) | fields))


def _pi05(path: Path, fields: dict[str, Any]) -> PI05Config:
    return PI05Config(**(_pi(path) | {"tokenizer_max_length": 64} | fields))


def _pi(path: Path) -> dict[str, Any]:
    steps = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "num_inference_steps": 2}
    return steps | {"image_resolution": (28, 28), "max_state_dim": 6, "max_action_dim": 6}


def _smolvla(path: Path, fields: dict[str, Any]) -> SmolVLAConfig:
    steps = {"chunk_size": CHUNK, "n_action_steps": CHUNK, "num_steps": 2, "num_vlm_layers": 4}
    small = {"resize_imgs_with_padding": (32, 32), "max_state_dim": 6, "max_action_dim": 6}
    return SmolVLAConfig(**(steps | small | {"vlm_model_name": str((path / _VLM).resolve())} | fields))


_CONFIGS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "act": _act,
    "diffusion": _diffusion,
    "pi0": _pi0,
    "pi05": _pi05,
    "smolvla": _smolvla,
}


def _write_vlm(path: Path) -> None:
    """Write the configuration, tokenizer and image processor of a small SmolVLM; it has no weights."""
    directory = path / _VLM
    text = {"vocab_size": _VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    SmolVLMConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"image_size": 32, "patch_size": 8, **vision},
        scale_factor=2,
        image_token_id=_VOCABULARY - 1,
        pad_token_id=0,
    ).save_pretrained(directory)
    special = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / TEXT_TOKENIZER / "tokenizer.json"),
        extra_special_tokens=special,
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(directory)
    SmolVLMImageProcessor().save_pretrained(directory)
    file = directory / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"processor_class": "SmolVLMProcessor"}
    file.write_text(json.dumps(content))


@contextmanager
def small_sizes() -> Iterator[None]:
    """Build pi0, pi0.5 and ResNet-18 at small sizes, and replace optional packages that are not installed.

    Everything that builds or loads such a policy must run inside, LeRobot's own loading included.
    """
    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05):
            replaced: dict[str, Any] = {
                "get_gemma_config": _small_gemma,
                "PaliGemmaForConditionalGenerationWithPiGemma": _small(
                    module.PaliGemmaForConditionalGenerationWithPiGemma
                ),
                "PiGemmaForCausalLM": _small(module.PiGemmaForCausalLM),
            }
            for name, value in replaced.items():
                stack.enter_context(replace_attribute(module, name, value))
        stack.enter_context(replace_attribute(torchvision.models, "resnet18", _SmallResNet))
        yield


class _SmallResNet(torchvision.models.ResNet):
    """ResNet-18 with a quarter of the channels after the stem."""

    def __init__(self, weights: None = None, **options: Any):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], **options)
        self.fc = nn.Linear(128, 2)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **options)


def _small_gemma(variant: str) -> Any:
    width, mlp_dim = _SIZES[variant]
    return modeling_pi0.GemmaConfig(width, 2, mlp_dim, num_heads=8, num_kv_heads=1, head_dim=8)


def _small(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def shrunk(config: Any) -> nn.Module:
        text = getattr(config, "text_config", config)
        text.vocab_size = _VOCABULARY
        if hasattr(config, "vision_config"):
            config.image_token_id = _VOCABULARY
            vision = config.vision_config
            vision.hidden_size, vision.intermediate_size = 32, 64
            vision.num_hidden_layers, vision.num_attention_heads = 2, 2
            vision.projection_dim = config.projection_dim = text.hidden_size
        return build(config=config)

    return shrunk


@contextmanager
def pinned_draws() -> Iterator[None]:
    """Give every sample the same random draws, whatever its rank and place in a batch.

    The policies draw noise, times and latents for a complete batch, so one process and several ranks draw
    differently. With this, their losses can be compared.
    """

    def noise(shape: Any, device: Any = None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tuple(shape)[1:], generator=generator).expand(tuple(shape)).to(device).clone()

    def time(count: int, device: Any = None, **_: Any) -> Tensor:
        return torch.full((count,), 0.4, device=device)

    def steps(*, low: int, high: int, size: Any, device: Any = None) -> Tensor:
        return torch.full(size, (low + high) // 2, device=device)

    pinned = {
        "randn": lambda shape=None, *, size=None, device=None, **_: noise(shape or size, device),
        "randn_like": lambda tensor: noise(tensor.shape, tensor.device),
        "randint": steps,
    }
    with ExitStack() as stack:
        for module in (modeling_act, modeling_diffusion):
            stack.enter_context(replace_attribute(module, "torch", _TorchWith(pinned)))
        for module in (modeling_pi0, modeling_pi05, modeling_smolvla):
            stack.enter_context(replace_attribute(module, "sample_noise", noise))
            stack.enter_context(replace_attribute(module, "sample_time_beta", time))
        yield


class _TorchWith(ModuleType):
    """The module torch with some functions replaced, for one module that uses it."""

    def __init__(self, replaced: dict[str, Any]):
        super().__init__("torch")
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
