"""Formats of Adam's moments that take fewer bytes than fp32: bf16, and 8 bits with one scale per block.

A moment is a matrix of rows of `BLOCK` elements. `pack` turns fp32 rows into the tensors that are stored, and
`unpack` turns them back. Packing rounds each element to one of its two neighbours in the format: up if its
distance from the lower one, as a share of their distance, exceeds `threshold`. A threshold of 0.5 rounds to
the nearest. A threshold drawn uniformly from [0, 1) rounds stochastically, without a bias. The second moment
needs that: with β₂ = 0.999 a step moves it by a thousandth at most downwards, while neighbours are 0.4 %
(bf16) to several per cent (8 bits) apart, so that rounding to the nearest would never let it fall.

8 bits (Dettmers et al. 2022, arXiv:2110.02861): each block of 256 elements is divided by its largest
magnitude and rounded in a table that is finer near 1, the dynamic map of bitsandbytes, with three changes:

- The first moment's table begins with −1 instead of −0.993, so that a block's largest magnitude is kept
  exactly whatever its sign. Packing to the nearest is then the inverse of unpacking, which checkpoints rely
  on: they hold moments in fp32.
- The second moment's table holds squares, since Adam divides by the root: the root has the map's own relative
  precision, and seven decades below the block's largest.
- The second moment's table has no 0, so that its smallest level is the floor. A second moment rounded to 0
  beside a first moment that is not would divide by `eps`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
# Smallest scale of a block. Below it, products with the smallest levels lose bits as subnormal numbers.
_SMALLEST_SCALE = 2.0**-70

Packed = tuple[Tensor, ...]


class MomentFormat(NamedTuple):
    """A format of one moment.

    Attributes:
        suffixes: Names of the stored tensors, to append to the moment's.
        zeros: Returns stored zeros: (number of rows, device).
        pack: Returns stored rows: (fp32 rows of shape (n, `BLOCK`), threshold of that shape or a number).
        unpack: Returns fp32 rows in new memory: (stored rows).
    """

    suffixes: tuple[str, ...]
    zeros: Callable[[int, torch.device], Packed]
    pack: Callable[[Tensor, Tensor | float], Packed]
    unpack: Callable[[Packed], Tensor]


def _bf16() -> MomentFormat:
    def zeros(rows: int, device: torch.device) -> Packed:
        return (torch.zeros(rows, BLOCK, dtype=torch.bfloat16, device=device),)

    def pack(values: Tensor, threshold: Tensor | float) -> Packed:
        # A bf16 is the upper half of an fp32: a carry from the lower half rounds up.
        share = threshold * (1 << 16)
        carry = 0xFFFF - (share.int() if isinstance(share, Tensor) else int(share))
        bits = (values.view(torch.int32) + carry).bitwise_and_(-(1 << 16))
        return (bits.view(torch.float32).bfloat16(),)

    return MomentFormat(("",), zeros, pack, lambda stored: stored[0].float())


class _Tables(NamedTuple):
    """What packing looks up on one device.

    Attributes:
        levels: The levels, ascending, and infinity.
        gaps: Distance of each level to the next.
        below: By the upper 16 bits of an fp32, the level at or below all numbers that begin with them.
    """

    levels: Tensor
    gaps: Tensor
    below: Tensor


def _tables(levels: Tensor, device: torch.device) -> _Tables:
    beginnings = torch.arange(1 << 16, dtype=torch.int32)
    # The smallest number that begins so: of negative ones, that with the largest magnitude.
    smallest = (beginnings << 16) + (beginnings >= 1 << 15).int() * 0xFFFF
    below = torch.bucketize(smallest.view(torch.float32), levels, right=True, out_int32=True).sub_(1)
    levels = torch.cat([levels, levels.new_tensor([torch.inf])])
    # Numbers below the first level, and NaN, get a code too.
    tables = levels, levels.diff(), below.clamp_(0, len(levels) - 2).to(torch.uint8)
    return _Tables(*(table.to(device) for table in tables))


def _int8(levels: Tensor) -> MomentFormat:
    on = cache(partial(_tables, levels))

    def look_up(table: Tensor, codes: Tensor) -> Tensor:
        return table.index_select(0, codes.view(-1)).view(codes.shape)

    def zeros(rows: int, device: torch.device) -> Packed:
        codes = torch.zeros(rows, BLOCK, dtype=torch.uint8, device=device)
        return codes, torch.zeros(rows, device=device)

    def pack(values: Tensor, threshold: Tensor | float) -> Packed:
        tables = on(values.device)
        scale = values.abs().amax(dim=1).clamp_(min=_SMALLEST_SCALE)
        unit = values / scale[:, None]
        codes = look_up(tables.below, (unit.view(torch.int32) >> 16).bitwise_and_(0xFFFF)).int()
        # At most one level lies among the numbers that begin with the same bits.
        codes += look_up(tables.levels, codes + 1) <= unit
        unit.sub_(look_up(tables.levels, codes))
        codes += unit > look_up(tables.gaps, codes).mul_(threshold)
        return codes.to(torch.uint8), scale

    def unpack(stored: Packed) -> Tensor:
        codes, scale = stored
        return look_up(on(codes.device).levels, codes.int()).mul_(scale[:, None])

    return MomentFormat(("", "_scale"), zeros, pack, unpack)


def dynamic_map(*, signed: bool) -> Tensor:
    """Return the levels of bitsandbytes' dynamic map, ascending: (256,) or, without a sign, (255,).

    Seven decades below 1, each with twice as many levels as the one below it. Signed it begins with −1;
    unsigned it has no 0.
    """
    levels = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        levels.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat([*levels, torch.ones(1, dtype=torch.float64)])
    if not signed:
        return positive
    negative = -positive.flip(0)
    return torch.cat([negative[:1], negative[2:], torch.zeros(1, dtype=torch.float64), positive])


FORMATS: dict[str, dict[str, MomentFormat]] = {
    "bf16": {"exp_avg": _bf16(), "exp_avg_sq": _bf16()},
    "int8": {
        "exp_avg": _int8(dynamic_map(signed=True).float()),
        "exp_avg_sq": _int8(dynamic_map(signed=False).square().float()),
    },
}
"""The formats of `--engine.optimizer_state` beside fp32, by moment."""


def moment_bytes(state: str, numel: int) -> int:
    """Return the bytes of both moments of a tensor in a format of `--engine.optimizer_state`."""
    if state == "fp32":
        return 8 * numel
    row = [form.zeros(1, torch.device("meta")) for form in FORMATS[state].values()]
    return -(-numel // BLOCK) * sum(tensor.nbytes for moment in row for tensor in moment)
