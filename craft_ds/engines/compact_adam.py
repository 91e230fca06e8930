"""Adam and AdamW with moments in bf16 or 8 bits, for any engine: they see flat fp32 tensors only.

The update is torch's, from moments that are in fp32 for a few million elements at a time; weights stay fp32.

torchao 0.17 has such optimizers, but their moments cannot be stored and divided as craft-ds does. They stay
fp32 without a message where a local shard has fewer than 4096 elements or not a multiple of 256, as uneven
shards do; the first moment changes when it is stored in fp32 and loaded again, so that a resumed run would
differ; learning rates must be tensors; and a kernel is compiled for every shape (61 s for two matrices on a
CPU core). bitsandbytes takes plain CUDA tensors only.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from craft_ds.engines.moment_formats import BLOCK, FORMATS, MomentFormat, Packed
from craft_ds.errors import UserError

# Elements that are updated at once: enough for an accelerator, and temporary tensors of some 150 MB.
ROWS_AT_ONCE = 1 << 14

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")


def compact(optimizer: torch.optim.Optimizer, state: str) -> torch.optim.Optimizer:
    """Return an optimizer that does the same with smaller moments.

    Args:
        optimizer: torch's Adam or AdamW, before its first step.
        state: `--engine.optimizer_state`; `fp32` returns the optimizer itself.

    Raises:
        UserError: It is another optimizer.
    """
    if state == "fp32":
        return optimizer
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    if not plain or any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
        raise UserError(
            f"--engine.optimizer_state={state} is for Adam and AdamW, not {type(optimizer).__name__} with "
            "these options: set --engine.optimizer_state=fp32"
        )
    groups = [{key: group[key] for key in ("params", *_HYPERPARAMETERS)} for group in optimizer.param_groups]
    return CompactAdam(groups, state)


class _Piece(NamedTuple):
    """Rows of one parameter that are updated at once; parameter and gradient are flat views.

    `state` holds the rows of the parameter's state.
    """

    parameter: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]
    rows: int
    step: int


class CompactAdam(torch.optim.Optimizer):
    """Adam or AdamW with moments in one of `FORMATS`; see `compact`.

    Moments are rounded stochastically. The random numbers follow from step and position, so that a resumed
    run draws those of an uninterrupted one, and replicas draw the same.

    State of a parameter: `step`, and for each moment the tensors of its format, in rows of `BLOCK` elements
    of the local shard; the last row is padded.

    Args:
        groups: Parameter groups with torch's hyperparameters.
        state: Key of `FORMATS`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], state: str):
        self._formats = FORMATS[state]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pieces = (
                piece for p in group["params"] if p.grad is not None for piece in self._pieces(p, p.grad)
            )
            for number, bundle in enumerate(_bundles(pieces)):
                self._update(bundle, group, number)
        return loss

    def _pieces(self, parameter: Tensor, gradient: Tensor) -> Iterator[_Piece]:
        flat, gradient = local_shard(parameter).view(-1), local_shard(gradient).reshape(-1)
        if not flat.numel():
            return
        state = self.state[parameter]
        if not state:
            self._create_state(state, parameter)
        state["step"] += 1
        tensors = {key: values for key, values in state.items() if key != "step"}
        rows = _rows(flat.numel())
        for start in range(0, rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, rows)
            part = slice(start * BLOCK, stop * BLOCK)
            own = {key: values[start:stop] for key, values in tensors.items()}
            yield _Piece(flat[part], gradient[part], own, stop - start, state["step"])

    def _create_state(self, state: dict[str, Any], parameter: Tensor) -> None:
        numel, device = local_shard(parameter).numel(), parameter.device
        state["step"] = 0
        for moment, form in self._formats.items():
            zeros = form.zeros(_rows(numel), device)
            state |= {moment + suffix: zero for suffix, zero in zip(form.suffixes, zeros, strict=True)}

    def _update(self, bundle: Sequence[_Piece], group: Mapping[str, Any], number: int) -> None:
        parameters, rows = [piece.parameter for piece in bundle], [piece.rows for piece in bundle]
        beta1, beta2 = group["betas"]
        decay, step = group["weight_decay"], bundle[0].step
        gradient = _as_rows([piece.gradient for piece in bundle], rows)
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * decay)
        elif decay:
            gradient = gradient.add(_as_rows(parameters, rows), alpha=decay)
        moments = {moment: self._unpack(bundle, moment) for moment in self._formats}
        average = moments["exp_avg"].lerp_(gradient, 1 - beta1)
        square = moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        del gradient
        threshold = _uniform(average, step, number)
        for moment, values in moments.items():
            form = self._formats[moment]
            for suffix, packed in zip(form.suffixes, form.pack(values, threshold), strict=True):
                stored = [piece.state[moment + suffix] for piece in bundle]
                torch._foreach_copy_(stored, packed.split(rows))
        average.div_(square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"]))
        updates = _without_padding(average, rows, parameters)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] / (1 - beta1**step))

    def _unpack(self, bundle: Sequence[_Piece], moment: str) -> Tensor:
        form = self._formats[moment]
        stored = ([piece.state[moment + suffix] for piece in bundle] for suffix in form.suffixes)
        return form.unpack(tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in stored))

    def moments(self, parameter: Tensor, start: int, numel: int) -> Mapping[str, Tensor]:
        """Return moments in fp32, flat and by name; each is computed when it is looked up.

        Args:
            parameter: One of the parameters.
            start: First element of its local shard.
            numel: Number of elements.
        """
        return _Unpacked(self, parameter, start, numel)

    @torch.no_grad()
    def set_moments(
        self, parameter: Tensor, names: Sequence[str], read: Callable[[str], Tensor], steps: int
    ) -> None:
        """Set the moments of a parameter's local shard, rounded to the nearest.

        Args:
            parameter: One of the parameters.
            names: Names of the moments.
            read: Returns a moment by name, fp32 and flat. Each is dropped before the next one is read.
            steps: Steps that the moments are of.

        Raises:
            ValueError: These are not Adam's moments.
        """
        if set(names) != self._formats.keys():
            raise ValueError(f"it holds {', '.join(names)}, not {', '.join(self._formats)}")
        state = self.state[parameter]
        state["step"] = steps
        for moment, form in self._formats.items():
            packed = _pack(read(moment), form)
            state |= {moment + suffix: tensor for suffix, tensor in zip(form.suffixes, packed, strict=True)}


class _Unpacked(Mapping[str, Tensor]):
    """Moments of a range of a parameter's local shard: see `CompactAdam.moments`."""

    def __init__(self, optimizer: CompactAdam, parameter: Tensor, start: int, numel: int):
        self._formats, self._state = optimizer._formats, optimizer.state.get(parameter, {})
        self._start, self._numel = start, numel

    def __getitem__(self, moment: str) -> Tensor:
        form = self._formats[moment]
        first, last = self._start // BLOCK, _rows(self._start + self._numel)
        stored = [self._state[moment + suffix][first:last] for suffix in form.suffixes]
        values = stored[0].new_empty(last - first, BLOCK, dtype=torch.float32)
        for part, *packed in zip(*(each.split(ROWS_AT_ONCE) for each in (values, *stored)), strict=True):
            part.copy_(form.unpack(tuple(packed)))
        return values.view(-1).narrow(0, self._start - first * BLOCK, self._numel)

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats if self._state else ())

    def __len__(self) -> int:
        return len(self._formats) if self._state else 0


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a possibly sharded tensor, without a copy."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def _rows(numel: int) -> int:
    return -(-numel // BLOCK)


def _pack(values: Tensor, form: MomentFormat) -> Packed:
    """Return a flat moment in a format, rounded to the nearest."""
    rows = _as_rows([values], [_rows(values.numel())])
    parts = [form.pack(part, 0.5) for part in rows.split(ROWS_AT_ONCE)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _bundles(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces of the same step and device together, of `ROWS_AT_ONCE` rows at most."""
    bundle: list[_Piece] = []
    for piece in pieces:
        if bundle:
            last, rows = bundle[-1], sum(each.rows for each in bundle)
            same = (piece.step, piece.parameter.device) == (last.step, last.parameter.device)
            if not same or rows + piece.rows > ROWS_AT_ONCE:
                yield bundle
                bundle = []
        bundle.append(piece)
    if bundle:
        yield bundle


def _as_rows(flats: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Return flat tensors as rows, padded with zeros; a view where there is one without padding."""
    if len(flats) == 1 and flats[0].numel() == rows[0] * BLOCK:
        return flats[0].view(rows[0], BLOCK)
    matrix = flats[0].new_zeros(sum(rows), BLOCK)
    torch._foreach_copy_(_without_padding(matrix, rows, flats), list(flats))
    return matrix


def _without_padding(matrix: Tensor, rows: Sequence[int], flats: Sequence[Tensor]) -> list[Tensor]:
    """Return flat views of rows, of the sizes of `flats`."""
    parts = matrix.split(list(rows))
    return [part.view(-1)[: flat.numel()] for part, flat in zip(parts, flats, strict=True)]


def _uniform(like: Tensor, step: int, number: int) -> Tensor:
    """Return random numbers in [0, 1), the same for the same step and number."""
    # A CPU generator uses 32 bits of its seed, and seeds that share the lower ones give similar numbers.
    seed = zlib.crc32(f"{step} {number}".encode())
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.rand(like.shape, generator=generator, device=like.device)
