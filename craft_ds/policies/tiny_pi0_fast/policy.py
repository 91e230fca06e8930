"""The embedded policy: LeRobot's pi0_fast with about one million parameters.

Only the constructors differ from `PI0FastPolicy`, whose sizes are fixed to PaliGemma's; here they are fields
of the configuration. Forward pass, loss, sampling and action selection are inherited, so code that works with
this policy works with pi0_fast. LeRobot finds the policy and its processors by name in the configuration's
own module: all three stay in this file.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPaliGemma, PI0FastPolicy, PI0FastPytorch
from lerobot.policies.pi0_fast.processor_pi0_fast import make_pi0_fast_pre_post_processors
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import ActionTokenizerProcessorStep, PolicyProcessorPipeline, ProcessorStepRegistry
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import nn
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto import CONFIG_MAPPING

from craft_ds.policies.tiny_pi0_fast.tokenizers import ACTION_TOKENIZER, TEXT_TOKENIZER, reroot_tokenizers

Processors = tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]


@PreTrainedConfig.register_subclass("tiny_pi0_fast")
@dataclass
class TinyPI0FastConfig(PI0FastConfig):
    """PI0FastConfig with its sizes as fields and defaults for a 64x64 camera and chunks of 8.

    Attributes:
        vocab_size: Ids of the text tokenizer, action tokens included.
        text_width: Hidden size of the Gemma decoder.
        text_depth: Its layers.
        text_mlp_dim: Its feed-forward size.
        text_heads: Its attention heads; one key-value head serves them all, as in gemma_2b.
        vision_width: Hidden size of the SigLIP encoder.
        vision_depth: Its layers.
        vision_mlp_dim: Its feed-forward size.
        vision_heads: Its attention heads.
        vision_patch: Side of a patch in pixels.
    """

    vocab_size: int = 652
    text_width: int = 128
    text_depth: int = 3
    text_mlp_dim: int = 384
    text_heads: int = 4
    vision_width: int = 96
    vision_depth: int = 2
    vision_mlp_dim: int = 192
    vision_heads: int = 4
    vision_patch: int = 16

    chunk_size: int = 8
    n_action_steps: int = 8
    max_action_tokens: int = 24
    max_decoding_steps: int = 24
    tokenizer_max_length: int = 64
    image_resolution: tuple[int, int] = (64, 64)
    text_tokenizer_name: str = TEXT_TOKENIZER
    action_tokenizer_name: str = ACTION_TOKENIZER
    fast_skip_tokens: int = 0
    # The state is encoded in 256 bins of [-1, 1]: MEAN_STD would clip it beyond one standard deviation.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    optimizer_lr: float = 1e-3
    scheduler_warmup_steps: int = 50
    scheduler_decay_steps: int = 2_000
    scheduler_decay_lr: float = 1e-5


class TinyPaliGemma(PI0FastPaliGemma):
    """PI0FastPaliGemma at the sizes of a TinyPI0FastConfig."""

    def __init__(self, config: TinyPI0FastConfig):
        nn.Module.__init__(self)
        hf_config = CONFIG_MAPPING["paligemma"](
            text_config={
                "model_type": "gemma",
                "vocab_size": config.vocab_size,
                "hidden_size": config.text_width,
                "intermediate_size": config.text_mlp_dim,
                "num_hidden_layers": config.text_depth,
                "num_attention_heads": config.text_heads,
                "num_key_value_heads": 1,
                "head_dim": config.text_width // config.text_heads,
                "hidden_activation": "gelu_pytorch_tanh",
                "dtype": "float32",
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": config.vision_width,
                "intermediate_size": config.vision_mlp_dim,
                "num_hidden_layers": config.vision_depth,
                "num_attention_heads": config.vision_heads,
                "image_size": config.image_resolution[0],
                "patch_size": config.vision_patch,
                "projection_dim": config.text_width,
                "vision_use_head": False,
                "dtype": "float32",
            },
            projection_dim=config.text_width,
            image_token_index=config.vocab_size,
            tie_word_embeddings=False,
        )
        hf_config.text_config.use_adarms = False
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=hf_config)
        # With SigLIP's own 0.02, so small an encoder does not learn positions.
        vision = self.paligemma.model.vision_tower.vision_model
        nn.init.normal_(vision.embeddings.position_embedding.weight, std=0.5)
        self.to_bfloat16_for_selected_params(config.dtype)


class TinyPI0FastPytorch(PI0FastPytorch):
    """PI0FastPytorch around a TinyPaliGemma."""

    def __init__(self, config: TinyPI0FastConfig, rtc_processor: Any = None, paligemma_tokenizer: Any = None):
        nn.Module.__init__(self)
        self.config = config
        self.rtc_processor = rtc_processor
        self._paligemma_tokenizer = paligemma_tokenizer
        self.paligemma_with_expert = TinyPaliGemma(config)
        self.gradient_checkpointing_enabled = False


class TinyPI0FastPolicy(PI0FastPolicy):
    """PI0FastPolicy at the sizes of a TinyPI0FastConfig."""

    config_class = TinyPI0FastConfig
    name = "tiny_pi0_fast"

    def __init__(self, config: TinyPI0FastConfig, **kwargs: Any):
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.action_tokenizer = AutoProcessor.from_pretrained(config.action_tokenizer_name)
        self._paligemma_tokenizer = AutoTokenizer.from_pretrained(
            config.text_tokenizer_name, add_eos_token=True, add_bos_token=False
        )
        if self._paligemma_tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"vocab_size is {config.vocab_size}, but {config.text_tokenizer_name} has "
                f"{self._paligemma_tokenizer.vocab_size} tokens"
            )
        self.init_rtc_processor()
        self.model = TinyPI0FastPytorch(config, self.rtc_processor, self._paligemma_tokenizer)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.to(config.device)
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> "TinyPI0FastPolicy":
        """Load as PI0FastPolicy does, with the tokenizers from the folders beside the weights."""
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        reroot_tokenizers(config, pretrained_name_or_path)
        return super().from_pretrained(pretrained_name_or_path, config=config, **kwargs)


@ProcessorStepRegistry.register(name="craft_action_tokenizer_processor")
@dataclass
class ReloadableActionTokenizerStep(ActionTokenizerProcessorStep):
    """ActionTokenizerProcessorStep that saves every field that decides the token ids."""

    def get_config(self) -> dict[str, Any]:
        """Return the step's parameters; LeRobot's own step omits the last two."""
        return super().get_config() | {
            "fast_skip_tokens": self.fast_skip_tokens,
            "paligemma_tokenizer_name": self.paligemma_tokenizer_name,
        }


def make_tiny_pi0_fast_pre_post_processors(
    config: TinyPI0FastConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> Processors:
    """Make LeRobot's processors of pi0_fast, with an action tokenizer step that can be saved and reloaded.

    Args:
        config: The policy's configuration; its tokenizer names must be loadable.
        dataset_stats: Statistics of the data set whose normalisation the policy keeps.
    """
    preprocessor, postprocessor = make_pi0_fast_pre_post_processors(config, dataset_stats)
    preprocessor.steps = [
        ReloadableActionTokenizerStep(
            action_tokenizer_name=step.action_tokenizer_name,
            max_action_tokens=step.max_action_tokens,
            fast_skip_tokens=step.fast_skip_tokens,
            paligemma_tokenizer_name=step.paligemma_tokenizer_name,
        )
        if isinstance(step, ActionTokenizerProcessorStep)
        else step
        for step in preprocessor.steps
    ]
    return preprocessor, postprocessor


def build_tiny_policy(
    dataset: Any,
    stats: dict[str, dict[str, Any]],
    text_tokenizer_dir: str | Path,
    action_tokenizer_dir: str | Path,
    seed: int,
    **overrides: Any,
) -> tuple[TinyPI0FastPolicy, PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Build a new policy with its processors.

    Args:
        dataset: A LeRobotDatasetMetadata, or the `features` dictionary of one.
        stats: The data set's statistics, with `min` and `max` of state and action.
        text_tokenizer_dir: A folder made by `build_text_tokenizer`.
        action_tokenizer_dir: A folder made by `fit_action_tokenizer`.
        seed: Seeds the initial weights; the global random state does not change.
        **overrides: Fields of TinyPI0FastConfig.

    Returns:
        The policy, the preprocessor and the postprocessor.
    """
    features = dataset_to_policy_features(getattr(dataset, "features", dataset))
    fields: dict[str, Any] = {"device": "cpu", "push_to_hub": False, **overrides}
    config = TinyPI0FastConfig(
        input_features={key: ft for key, ft in features.items() if ft.type.name != "ACTION"},
        output_features={key: ft for key, ft in features.items() if ft.type.name == "ACTION"},
        text_tokenizer_name=str(text_tokenizer_dir),
        action_tokenizer_name=str(action_tokenizer_dir),
        vocab_size=AutoTokenizer.from_pretrained(text_tokenizer_dir).vocab_size,
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = TinyPI0FastPolicy(config)
    return policy, *make_tiny_pi0_fast_pre_post_processors(config, stats)
