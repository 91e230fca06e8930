"""Metrics of learning tasks one after the other, from a matrix of results.

`matrix[i][j]` is the result on task j after stage i, which learns task i; both count from 0, and the matrix
is square, K×K. Results are success rates. For losses, -`nbt` and -`forgetting` are positive where tasks are
forgotten. The formulas count from 1.

Sources: LIBERO (Liu et al. 2023, arXiv:2306.03310, "evaluation metrics") for `fwt`, `nbt` and `auc`;
Continual World (Wołczyk et al. 2021, arXiv:2105.10919, "metrics") for `forgetting` and `forward_transfer`.
LIBERO takes c_{k,k} and c_{k,j} from the best checkpoint of stage k; R[k, j] is the result of its last
policy, with which the next stage starts.

Examples:
    >>> matrix = [[0.8, 0.0], [0.6, 0.9]]
    >>> round(final_average(matrix), 4), round(nbt(matrix), 4), round(forgetting(matrix), 4)
    (0.75, 0.2, 0.1)
"""

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]
Curves = Sequence[Sequence[float]]
"""For each task, its results at checkpoints of its own stage: at the start, at even distances, at the end."""


def final_average(matrix: Matrix) -> float:
    """Return the average result on all tasks after the last stage: SR = 1/K Σ_j R[K, j]."""
    _check_square(matrix)
    return fmean(matrix[-1])


def fwt(curves: Curves) -> float:
    """Return LIBERO's forward transfer: how well and how fast each task is learned in its own stage.

    FWT = 1/K Σ_k FWT_k with FWT_k = 1/E Σ_e c_{k,k,e}, the mean over the E checkpoints of stage k. With the
    end of the stage as the only checkpoint, it is the mean result right after learning, 1/K Σ_k R[k, k].

    Raises:
        ValueError: `curves` is empty, or a task has no checkpoint.
    """
    return fmean(_means(curves))


def nbt(matrix: Matrix) -> float:
    """Return LIBERO's negative backward transfer: the mean loss of what was learned; lower is better.

    NBT_k = 1/(K−k) Σ_{i=k+1..K} (R[k, k] − R[i, k]), averaged over the K−1 tasks that a later stage follows.
    (The paper writes the average over all K, with an empty sum for the last: it is (K−1)/K of this if that
    counts as 0.) A sequence of one stage forgets nothing: 0.
    """
    _check_square(matrix)
    lost = [fmean(matrix[k][k] - row[k] for row in matrix[k + 1 :]) for k in range(len(matrix) - 1)]
    return fmean(lost) if lost else 0.0


def auc(matrix: Matrix, curves: Curves) -> float:
    """Return LIBERO's area under the success curve, from the start of each task's stage to the end.

    AUC = 1/K Σ_k AUC_k with AUC_k = 1/(K−k+1) (FWT_k + Σ_{i=k+1..K} R[i, k]).

    Raises:
        ValueError: There are not as many curves as tasks.
    """
    _check_square(matrix)
    own = _means(curves)
    if len(own) != len(matrix):
        raise ValueError(f"{len(own)} curves for {len(matrix)} tasks")
    return fmean(fmean([own[k], *(row[k] for row in matrix[k + 1 :])]) for k in range(len(matrix)))


def forgetting(matrix: Matrix) -> float:
    """Return Continual World's forgetting: F = 1/K Σ_k (R[k, k] − R[K, k]); that of the last task is 0."""
    _check_square(matrix)
    return fmean(matrix[k][k] - matrix[-1][k] for k in range(len(matrix)))


def forward_transfer(curves: Curves, references: Curves) -> float:
    """Return Continual World's forward transfer: area gained over learning each task alone.

    FT = 1/K Σ_k (AUC_k − AUC_k^b)/(1 − AUC_k^b), with AUC_k the mean of a task's curve in the sequence and
    AUC_k^b that of the reference, which learns the task alone from the start. 1 is the best possible, 0 is
    no gain.

    Raises:
        ValueError: There are not as many references as curves, or a reference succeeds always, so that
            nothing can be gained.
    """
    own, alone = _means(curves), _means(references)
    if len(own) != len(alone):
        raise ValueError(f"{len(alone)} references for {len(own)} tasks")
    if max(alone) >= 1.0:
        raise ValueError("a reference succeeds from its first checkpoint on: forward transfer is undefined")
    return fmean((area - base) / (1.0 - base) for area, base in zip(own, alone, strict=True))


def _means(curves: Curves) -> list[float]:
    if not curves or not all(curves):
        raise ValueError("every task needs a checkpoint")
    return [fmean(curve) for curve in curves]


def _check_square(matrix: Matrix) -> None:
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        raise ValueError("the matrix must be square, with a row per stage and a column per task")
