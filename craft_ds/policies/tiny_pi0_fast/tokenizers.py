"""Locally trained tokenizers that replace PaliGemma's and FAST's, and their folders.

pi0_fast writes action token t as text token `vocab_size - 1 - fast_skip_tokens - t`: the text vocabulary
made here ends with the action tokens, so that words and actions share no id.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from lerobot.configs import PreTrainedConfig
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoProcessor, GemmaTokenizer, PretrainedConfig

from craft_ds.policies.tiny_pi0_fast.fast_tokenizer import FastActionProcessor

TEXT_TOKENIZER = "text_tokenizer"
ACTION_TOKENIZER = "action_tokenizer"

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_ALPHABET = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;|-'\n"))
_MERGED_PIECES = 64


class FastTokenizerConfig(PretrainedConfig):
    """Registration key under which `AutoProcessor` finds FastActionProcessor without remote code."""

    model_type = "craft_fast"


AutoProcessor.register(FastTokenizerConfig, FastActionProcessor, exist_ok=True)


def build_text_tokenizer(
    texts: Iterable[str], out_dir: str | Path, action_vocab_size: int = 256, numbers: int = 0
) -> GemmaTokenizer:
    """Train a Gemma-class tokenizer (byte-fallback BPE) on task texts and save it.

    `:` and `|` are always tokens of their own, `Action` is one token: pi0_fast's prompt and its decoding rely
    on that. Digits are tokens of their own, but for `numbers`. Unknown characters fall back to bytes.

    Args:
        texts: Task texts.
        out_dir: Output folder.
        action_vocab_size: Number of ids to append for action tokens.
        numbers: Integers from 0 below this are one token each, with the space before them; 0: none. Each
            value of a state is then at the same place in the prompt, however many digits it has.

    Returns:
        The tokenizer; `vocab_size` is the size that the policy's configuration must have.
    """
    corpus = [text.strip() for text in texts]
    prompts = [f"Task: {text}, State: 0 1;\nAction: |" for text in corpus]
    # BPE merges frequent pieces: "Action" must become one piece for any texts.
    corpus = prompts + ["Action: |"] * (10 * len(prompts) + 10)

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9:;,|.\\n]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(_ALPHABET) + _MERGED_PIECES,
        limit_alphabet=len(_ALPHABET),
        initial_alphabet=_ALPHABET,
        min_frequency=1,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    learned = json.loads(learner.to_str())["model"]

    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    wholes = [f"▁{number}" for number in range(numbers)]
    order = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *wholes]
    order += [f"<action{i}>" for i in reversed(range(action_vocab_size))]
    vocab = {token: i for i, token in enumerate(order)}
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        # First those of numbers, each from the number without its last digit.
        merges=[(whole[:-1], whole[-1]) for whole in wholes] + [tuple(pair) for pair in learned["merges"]],
        add_bos_token=True,
        add_eos_token=False,
    )
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def fit_action_tokenizer(
    chunks: np.ndarray, out_dir: str | Path, scale: float = 4.0, vocab_size: int = 256
) -> FastActionProcessor:
    """Fit a FAST tokenizer on normalised action chunks and save it.

    Args:
        chunks: Actions normalised to [-1, 1], shape (samples, time, action_dim).
        out_dir: Output folder.
        scale: The factor before rounding; see FastActionProcessor.
        vocab_size: Maximum number of action tokens.
    """
    tokenizer = FastActionProcessor.fit(chunks, scale=scale, vocab_size=vocab_size)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def reroot_tokenizers(config: PreTrainedConfig, directory: str | Path) -> None:
    """Set a configuration's tokenizer names to the folders in its own policy directory, where they exist.

    A policy directory may be moved or cloned, so the stored names may be relative or stale.
    """
    for field, folder in (
        ("text_tokenizer_name", TEXT_TOKENIZER),
        ("action_tokenizer_name", ACTION_TOKENIZER),
    ):
        if hasattr(config, field) and (Path(directory) / folder).is_dir():
            setattr(config, field, str(Path(directory) / folder))
