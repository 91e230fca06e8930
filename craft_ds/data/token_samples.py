"""Send a sample of prompts and action chunks through a policy's tokenizers, and the actions back."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import (
    ActionTokenizerProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    TokenizerProcessorStep,
)
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor

from craft_ds.data.normalisation import normalise
from craft_ds.data.tabular import TabularData
from craft_ds.policies.lerobot_internals import detokenize_actions

_MOST_TASKS = 512
_ROUNDING = 1e-3


@dataclass(frozen=True)
class TokenLengths:
    """Lengths in tokens, before anything is cut.

    Attributes:
        max: The longest.
        p99: 99th percentile.
        limit: The longest that the policy takes.
        cut: Share of samples that are longer.
    """

    max: int
    p99: int
    limit: int
    cut: float


@dataclass(frozen=True)
class ActionError:
    """Difference of recorded actions and of what their own tokens decode to, in one dimension.

    Attributes:
        error: Root mean square error in the data's units.
        relative: `error` divided by the standard deviation of the recorded actions; None if they do not move.
        saturated: Share of chunks with an error beyond quantisation.
    """

    error: float
    relative: float | None
    saturated: float


@dataclass(frozen=True)
class TokenSample:
    """Result of a sample.

    Attributes:
        samples: Number of samples; 0 for a policy without tokenizers.
        prompts: Lengths of the prompts; None if the policy has none.
        actions: Lengths of the action tokens; None if the policy has none.
        errors: One per action dimension; empty where actions are not decoded.
        saturated: Share of chunks with an error beyond quantisation in any dimension.
        whole_chunk: Actions are decoded over as many steps as were encoded.
    """

    samples: int = 0
    prompts: TokenLengths | None = None
    actions: TokenLengths | None = None
    errors: tuple[ActionError, ...] = ()
    saturated: float = 0.0
    whole_chunk: bool = True


def sample_tokens(
    table: TabularData,
    tasks: Any,
    keys: Mapping[str, str],
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    samples: int,
) -> TokenSample:
    """Tokenize evenly spaced samples, and the first one of every other task.

    Args:
        table: The data set's tabular fields.
        tasks: The data set's task texts as LeRobot has them: a DataFrame whose rows are tasks; None: none.
        keys: Names of states and actions in the policy by those in the data set.
        config: The policy's configuration.
        preprocessor: The policy's preprocessor.
        postprocessor: The policy's postprocessor.
        samples: Number of evenly spaced samples.
    """
    spells = next(
        (step for step in preprocessor.steps if isinstance(step, ActionTokenizerProcessorStep)), None
    )
    prompts = any(isinstance(step, TokenizerProcessorStep) for step in preprocessor.steps)
    if not (prompts or spells) or tasks is None:
        return TokenSample()
    offsets = config.action_delta_indices or [0]
    rows = _rows(table, samples)
    chunks = table.chunks(rows, offsets)
    finite = np.ones(len(rows), dtype=bool)
    batch: dict[str, Any] = {}
    for key, policy_key in keys.items():
        values = table.fields[key][chunks if policy_key == ACTION else rows].astype(np.float32)
        finite &= np.isfinite(values).reshape(len(rows), -1).all(axis=1)
        batch[policy_key] = values
    batch = {key: torch.from_numpy(values[finite]) for key, values in batch.items()}
    rows = rows[finite]
    if not len(rows):
        return TokenSample()
    batch["task"] = [str(tasks.iloc[task].name) for task in table.task[rows]]
    lengths, tokens = _encode(preprocessor, batch)
    sample = TokenSample(len(rows), lengths.get("prompts"), lengths.get("actions"))
    if spells is None or tokens is None:
        return sample
    return _with_errors(sample, batch, tokens, config, preprocessor, postprocessor, spells)


def _rows(table: TabularData, samples: int) -> np.ndarray:
    even = np.arange(0, len(table), max(1, -(-len(table) // samples)))
    _, first = np.unique(table.task, return_index=True)
    other = first[~np.isin(table.task[first], table.task[even])]
    return np.concatenate([even, other[:_MOST_TASKS]])


def _encode(
    preprocessor: PolicyProcessorPipeline, batch: dict[str, Any]
) -> tuple[dict[str, TokenLengths], Tensor | None]:
    """Return the lengths, and the action tokens as the policy is trained on them: cut, and padded with 0."""
    lengths: dict[str, TokenLengths] = {}
    tokens = None
    transition = preprocessor.to_transition(batch)
    for step in preprocessor.steps:
        if isinstance(step, TokenizerProcessorStep):
            texts = step.get_task(transition) or []
            ids = step.input_tokenizer(texts, truncation=False, padding=False)["input_ids"]
            lengths["prompts"] = _lengths([len(one) for one in ids], step.max_length)
        elif isinstance(step, ActionTokenizerProcessorStep):
            # LeRobot's step cuts, and prints a line for each chunk that it cuts.
            uncut = copy.copy(step)
            uncut.max_action_tokens = 64 + 4 * batch[ACTION][0].numel()
            transition = uncut(transition)
            extra = transition[TransitionKey.COMPLEMENTARY_DATA]
            mask, limit = extra[ACTION_TOKEN_MASK], step.max_action_tokens
            lengths["actions"] = _lengths(mask.sum(dim=1).tolist(), limit)
            tokens = torch.where(mask, extra[ACTION_TOKENS], 0)[:, :limit]
        elif not isinstance(step, DeviceProcessorStep):
            transition = step(transition)
    return lengths, tokens


def _lengths(found: list[int], limit: int) -> TokenLengths:
    counts = np.asarray(found)
    p99 = int(np.quantile(counts, 0.99, method="higher"))
    return TokenLengths(int(counts.max()), p99, limit, float((counts > limit).mean()))


def _with_errors(
    sample: TokenSample,
    batch: dict[str, Any],
    tokens: Tensor,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    spells: ActionTokenizerProcessorStep,
) -> TokenSample:
    """Decode the tokens and compare.

    Rounding changes each coefficient of an orthonormal transform over time by at most half a step, 0.5 /
    scale: the root mean square error of a chunk in one dimension cannot be larger unless coefficients
    saturate or tokens are cut.
    """
    if config.output_features[ACTION].shape[0] != batch[ACTION].shape[2]:
        return sample
    steps = config.n_action_steps
    scaled = normalise(preprocessor, batch)[ACTION][:, :steps].double()
    decoded = detokenize_actions(config, spells, tokens[:, 1:])  # without the token that starts an action
    recorded, restored = batch[ACTION][:, :steps].double(), postprocessor(decoded).double()
    quantisation = 0.5 / float(getattr(spells.action_tokenizer, "scale", 1.0)) + _ROUNDING
    beyond = (decoded.double() - scaled).square().mean(dim=1).sqrt() > quantisation
    error = (restored - recorded).square().mean(dim=(0, 1)).sqrt()
    spread = recorded.flatten(0, 1).std(dim=0, correction=0)
    errors = tuple(
        ActionError(float(one), float(one / moves) if moves > 0 else None, float(share))
        for one, moves, share in zip(error, spread, beyond.double().mean(dim=0), strict=True)
    )
    return TokenSample(
        sample.samples,
        sample.prompts,
        sample.actions,
        errors,
        saturated=float(beyond.any(dim=1).double().mean()),
        whole_chunk=steps == batch[ACTION].shape[1],
    )
