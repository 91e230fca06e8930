"""A FAST action tokenizer: DCT over time, rounding, byte-pair encoding (Pertsch et al., arXiv 2501.09747).

This file imports nothing of the package: ``save_pretrained`` puts a copy of it beside the tokenizer, so that
``AutoProcessor.from_pretrained(directory, trust_remote_code=True)`` works where craft_ds is not imported.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

# Coefficients are spelled with consecutive characters from here on: a block of 20,992 letters, with no
# control character, blank or combining mark that a tokenizer could normalise away.
FIRST_SYMBOL = 0x4E00


def quantised_dct(chunk: np.ndarray, scale: float) -> np.ndarray:
    """Rounded orthonormal DCT-II over time.

    Args:
        chunk: Normalised actions, shape (..., time, action_dim).
        scale: Coefficients are multiplied by this before rounding; larger is finer.

    Returns:
        Integers of the same shape.
    """
    return np.rint(dct(np.asarray(chunk, dtype=np.float64), axis=-2, norm="ortho") * scale).astype(np.int64)


class FastActionProcessor(ProcessorMixin):
    """Turns a chunk of normalised actions into a short list of tokens and back.

    Coefficients outside the fitted range saturate at its ends, so that every chunk has an encoding.

    Attributes:
        bpe_tokenizer: The byte-pair encoder on coefficient symbols.
        scale: The factor before rounding.
        min_token: ``ord(symbol) + min_token`` is the symbol's coefficient.
        max_token: The largest coefficient of the fitted range.
        vocab_size: The number of token ids that the encoder may use.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        scale: float = 4.0,
        min_token: int = -FIRST_SYMBOL,
        max_token: int = 0,
        vocab_size: int = 256,
    ):
        self.scale = scale
        self.min_token = min_token
        self.max_token = max_token
        self.vocab_size = vocab_size
        super().__init__(tokenizer)

    @property
    def bpe_tokenizer(self) -> PreTrainedTokenizerFast:
        """The byte-pair encoder, under the name that PI0FastPolicy reads."""
        return self.tokenizer

    def __call__(self, chunks: np.ndarray) -> list[list[int]]:
        """Encode chunks.

        Args:
            chunks: Normalised actions, shape (batch, time, action_dim) or (time, action_dim).

        Returns:
            One list of token ids a chunk.
        """
        chunks = np.asarray(chunks)
        if chunks.ndim == 2:
            chunks = chunks[None]
        coefficients = quantised_dct(chunks, self.scale)
        coefficients = coefficients.clip(self.min_token + FIRST_SYMBOL, self.max_token)
        return [self.bpe_tokenizer(_spell(c, self.min_token))["input_ids"] for c in coefficients]

    def decode(self, tokens: Iterable[list[int]], *, time_horizon: int, action_dim: int) -> np.ndarray:
        """Invert ``__call__`` up to rounding.

        Args:
            tokens: One list of token ids a chunk.
            time_horizon: Steps in a chunk.
            action_dim: Entries of an action.

        Returns:
            Actions, shape (batch, time_horizon, action_dim).

        Raises:
            ValueError: If a list does not spell exactly ``time_horizon * action_dim`` coefficients.
        """
        chunks = []
        for ids in tokens:
            symbols = self.bpe_tokenizer.decode(ids)
            coefficients = np.array([ord(symbol) for symbol in symbols], dtype=np.float64) + self.min_token
            if coefficients.size != time_horizon * action_dim:
                raise ValueError(
                    f"{coefficients.size} coefficients do not make {time_horizon}x{action_dim} actions"
                )
            chunks.append(
                idct(coefficients.reshape(time_horizon, action_dim) / self.scale, axis=0, norm="ortho")
            )
        return np.stack(chunks)

    @classmethod
    def fit(cls, chunks: np.ndarray, scale: float = 4.0, vocab_size: int = 256) -> "FastActionProcessor":
        """Train the encoder on normalised chunks.

        Args:
            chunks: Shape (samples, time, action_dim).
            scale: The factor before rounding.
            vocab_size: The most token ids to use; at least the number of different coefficients.

        Raises:
            ValueError: If the coefficients span more values than ``vocab_size``.
        """
        coefficients = quantised_dct(chunks, scale)
        low, high = int(coefficients.min()), int(coefficients.max())
        if high - low + 1 > vocab_size:
            raise ValueError(
                f"scale {scale} gives {high - low + 1} coefficients, more than vocab_size {vocab_size}"
            )
        min_token = low - FIRST_SYMBOL

        def spelled() -> Iterator[str]:
            for chunk in coefficients:
                yield _spell(chunk, min_token)

        encoder = Tokenizer(models.BPE())
        encoder.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[chr(FIRST_SYMBOL + i) for i in range(high - low + 1)],
        )
        encoder.train_from_iterator(spelled(), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder, clean_up_tokenization_spaces=False)
        return cls(tokenizer, scale=scale, min_token=min_token, max_token=high, vocab_size=vocab_size)


def _spell(coefficients: np.ndarray, min_token: int) -> str:
    return "".join(chr(c - min_token) for c in coefficients.ravel().tolist())


# Makes save_pretrained copy this file and name it in processor_config.json.
FastActionProcessor.register_for_auto_class("AutoProcessor")
