"""Search for the teacher's share α in interpolated weights, by losses on held-out anchors and task episodes.

One policy is in memory, and the teacher's weights: α rises, and each step moves the weights in place.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lerobot.configs import PreTrainedConfig
from torch import Tensor, nn

from craft_ds.anchors.cache_list import Anchors, open_caches
from craft_ds.anchors.sampler import iter_split, to_policy_batch
from craft_ds.config.craft_config import split_directories
from craft_ds.errors import UserError
from craft_ds.export.alpha_choice import TABLE_HEAD, AlphaLosses, choose_alpha, table_line
from craft_ds.export.comparison_samples import MICRO_BATCH
from craft_ds.export.heldout_frames import heldout_frames
from craft_ds.export.interpolate import check_pair
from craft_ds.export.verify_merge import in_fp32
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES
from craft_ds.policies.support import check_craft_policy
from craft_ds.policies.token_loss import Batch, Loss, token_loss
from craft_ds.policies.weights import WeightReader, unique_tensors
from craft_ds.tensor_io.filesystem import atomic_file

DEFAULT_ALPHAS = tuple(tenths / 10 for tenths in range(11))


@dataclass(frozen=True)
class AlphaSearch:
    """What to measure, and the constraint that the exported policy must satisfy.

    Attributes:
        anchor_cache_dir: Anchors of the old tasks; the held-out ones are measured.
        epsilon: Largest anchor loss.
        epsilon_relative: `epsilon` is in multiples of L0, the loss of the cache's teacher on these anchors.
        retention_loss: The loss on anchors.
        alphas: Shares of the teacher to try, in [0, 1].
        dataset_repo_id: Data set with held-out episodes of the new task; empty: no task loss is measured.
        dataset_root: Its local directory; None: LeRobot's cache, then the hub.
        max_eval_samples: Largest number of anchors, and of frames; 0: all.
    """

    anchor_cache_dir: str
    epsilon: float
    epsilon_relative: bool = False
    retention_loss: str = "token_ce"
    alphas: Sequence[float] = DEFAULT_ALPHAS
    dataset_repo_id: str = ""
    dataset_root: str | None = None
    max_eval_samples: int = 0

    def validate(self) -> None:
        """Check every value for itself.

        Raises:
            UserError: Names the flag and what it must be.
        """
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise UserError(f"--alphas: {alpha} must lie in [0, 1]")
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"--epsilon={self.epsilon} must be finite and not negative")
        if self.max_eval_samples < 0:
            raise UserError(f"--max_eval_samples={self.max_eval_samples} must not be negative")
        if self.epsilon_relative and RETENTION_LOSSES[self.retention_loss].zero_for_teacher:
            raise UserError(
                f"--epsilon_relative: the teacher's own {self.retention_loss} is 0, and ε cannot be a "
                "multiple of it: give an absolute --epsilon"
            )
        if self.dataset_root is not None and not self.dataset_repo_id:
            raise UserError("--dataset_root needs --dataset_repo_id: give the data set any name")


def search_alpha(
    search: AlphaSearch, checkpoint: Path, teacher: str, report: Path, device: str = "cpu"
) -> tuple[float, str]:
    """Measure every share of the teacher, print a table, write it as JSON, and choose one.

    The policies compute in fp32.

    Args:
        search: What to measure.
        checkpoint: The fine-tuned policy.
        teacher: Directory or hub id of a policy of the same architecture, with the same processors.
        report: The JSON file.
        device: Device on which the policies compute.

    Returns:
        The chosen α and a description of the choice.

    Raises:
        UserError: The policies cannot be interpolated, anchors or data set do not fit, or no share satisfies
            the constraint.
    """
    search.validate()
    directory = check_pair(checkpoint, teacher)
    config = load_policy_config(checkpoint)
    cache = _open_anchors(search, checkpoint, config)
    teacher_loss = cache.loss_of(search.retention_loss)["heldout"]["overall"]
    epsilon = search.epsilon * (teacher_loss if search.epsilon_relative else 1.0)
    frames = None
    if search.dataset_repo_id:
        frames = heldout_frames(
            checkpoint, config, search.dataset_repo_id, search.dataset_root, search.max_eval_samples, device
        )

    policy = load_policy(in_fp32(config), checkpoint, device).eval()
    theirs = read_weights(directory, policy)
    anchor_loss = RETENTION_LOSSES[search.retention_loss].loss

    def measure(alpha: float) -> AlphaLosses:
        on_anchors = mean_loss(policy, _anchor_batches(cache, search, device), anchor_loss)
        row = AlphaLosses(alpha, on_anchors, mean_loss(policy, frames()) if frames else None)
        print(table_line(row), flush=True)
        return row

    print(TABLE_HEAD, flush=True)
    rows = sweep(policy, theirs, search.alphas, measure)
    chosen = choose_alpha(rows, epsilon)
    measured = {
        "checkpoint": str(checkpoint),
        "teacher": teacher,
        **asdict(search),
        "teacher_loss": teacher_loss,
        "largest_anchor_loss": epsilon,
        "rows": [_as_json(row) for row in rows],
        "chosen": chosen and chosen.alpha,
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(report) as temporary:
        temporary.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    if chosen is None:
        nearest = min(rows, key=lambda row: row.anchor_loss)
        raise UserError(
            f"no share of {teacher} gives an anchor loss of at most {epsilon:.4g}: the lowest is "
            f"{nearest.anchor_loss:.4g} at alpha={nearest.alpha:g} ({report}); raise --epsilon, or try other "
            "--alphas"
        )
    losses = f"anchor loss {chosen.anchor_loss:.4g} ≤ {epsilon:.4g}"
    losses += "" if chosen.task_loss is None else f", task loss {chosen.task_loss:.4g}"
    return chosen.alpha, f"chosen of {len(rows)} ({losses}; all in {report})"


def _as_json(row: AlphaLosses) -> dict[str, float | None]:
    """Return a row for strict JSON: a non-finite loss becomes null."""
    values = row._asdict().items()
    return {name: value if value is None or math.isfinite(value) else None for name, value in values}


def _open_anchors(search: AlphaSearch, checkpoint: Path, config: PreTrainedConfig) -> Anchors:
    """Open the anchors, and check that the checkpoint's policy reads them as the teacher did."""
    check_craft_policy(config, "--alpha=auto measures anchors")
    cache = open_caches(split_directories(search.anchor_cache_dir))
    cache.check_policy(config)
    cache.check_preprocessor(load_processors(config, checkpoint)[0], checkpoint)
    if not cache.splits["heldout"]:
        raise UserError(
            f"anchor cache {cache.path} has no held-out anchors: build one of tasks with at least two "
            "episodes by `craft-ds anchors --heldout_fraction=0.2`"
        )
    return cache


def read_weights(directory: Path, policy: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point weights of another policy, with the dtype and device of those of `policy`."""
    with WeightReader(directory, policy) as weights:
        return {
            name: weights.read(name, 0, tensor.numel()).to(tensor).view_as(tensor)
            for name, tensor in unique_tensors(policy).items()
            if tensor.is_floating_point()
        }


@torch.no_grad()
def sweep(
    policy: nn.Module,
    theirs: Mapping[str, Tensor],
    alphas: Iterable[float],
    measure: Callable[[float], AlphaLosses],
) -> list[AlphaLosses]:
    """Move a policy's weights θ towards others in place, and measure it at each α, in rising order.

    From α to α' the weights move by (α' − α) / (1 − α) of the remaining way, so that θ itself need not be
    kept.

    Args:
        policy: Changed in place.
        theirs: The other weights, by the policy's names.
        alphas: Shares of the other weights.
        measure: Measures the policy at an α.
    """
    ours = unique_tensors(policy)
    rows, now = [], 0.0
    for alpha in sorted(set(alphas)):
        if alpha > now:
            for name, their in theirs.items():
                ours[name].lerp_(their, (alpha - now) / (1 - now))
            now = alpha
        rows.append(measure(alpha))
    return rows


@torch.no_grad()
def mean_loss(policy: nn.Module, batches: Iterable[Batch], loss: Loss = token_loss) -> float:
    """Return the mean of a loss over all batches, per supervised token."""
    total = count = 0.0
    for batch in batches:
        found = loss(policy, batch)
        total, count = total + float(found.total), count + float(found.count)
    return total / count if count else math.nan


def _anchor_batches(cache: Anchors, search: AlphaSearch, device: str) -> Iterator[Batch]:
    for rows, _ in iter_split(cache, "heldout", MICRO_BATCH, 0, 1, search.max_eval_samples or None):
        yield to_policy_batch(cache.read(rows, retention_loss=search.retention_loss), device)
