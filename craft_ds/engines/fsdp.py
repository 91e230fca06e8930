"""PyTorch's FSDP2 (`fully_shard`) behind the engine protocol."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from craft_ds.config.configs import FsdpConfig
from craft_ds.engines.base import Batch, ReadRange, Shard, fill_
from craft_ds.engines.batch_norm import average_running_statistics_
from craft_ds.engines.fsdp_wrapping import (
    gathered_dtype,
    local,
    make_mesh,
    mesh_shape,
    reshard_,
    rows,
    shard_,
)
from craft_ds.engines.fused_adam import fuse_
from craft_ds.engines.grad_shards import GradShards
from craft_ds.engines.optimizer_state import Part, load_moments, read_moments
from craft_ds.errors import UserError
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.policies.token_loss import Loss, PolicyWithLoss, TokenLoss, token_loss
from craft_ds.policies.weights import unique_tensors


class FsdpEngine(GradShards):
    """FSDP2: parameters, gradients and optimizer state sharded by rows, as DTensors.

    FSDP2 reduces every micro-batch into `.grad`, which therefore holds shards only. `take_gradient` takes
    those tensors away: a retention step adds one gradient shard and copies nothing.

    Args:
        module: The policy with its loss; parameters may be on the meta device.
        read: Reads weights by range.
        build_optimizer: Builds the optimizer of the sharded parameters.
        options: Flags of FSDP2.
        dtype: Dtype of forward and backward; master weights and moments are fp32.

    Raises:
        UserError: `options` do not match the number of processes, or a parameter cannot be sharded.
    """

    def __init__(
        self,
        module: PolicyWithLoss,
        read: ReadRange,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        options: FsdpConfig,
        dtype: torch.dtype = torch.float32,
    ):
        self.module = module
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = _device()
        self.replicas, self._shards = mesh_shape(options, self.world_size)
        mesh = make_mesh(self.replicas, self._shards, self.device)
        self._shard_rank = mesh.get_local_rank("dp_shard")
        param_dtype = gathered_dtype(options, dtype)
        # Layers outside all units are not cast by FSDP2 and receive bf16 and fp32 mixed.
        self._dtype = min(dtype, param_dtype, key=lambda dtype: dtype.itemsize)
        shard_(module, mesh, options, param_dtype)
        materialize_(module, "cpu" if options.cpu_offload else self.device)
        for buffer in module.buffers():
            buffer.data = buffer.to(self.device)
        self.load_parameters(read)
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = fuse_(build_optimizer())

    def forward(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Return the loss of this rank's micro-batch. Collective: call on all ranks."""
        self.module.train()
        return self._run(batch, loss)

    def _run(self, batch: Batch, call: Callable[..., Any]) -> Any:
        try:
            with self._autocast():
                return self.module(batch, call=call)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise UserError(
                f"--engine=fsdp: {type(self.module.policy).__name__} reads the weight of a module that it "
                "does not call, so that FSDP2 has not gathered it: use --ds_config=zero2, or register its "
                "units with craft_ds.policies.wrapping.shard_units"
            ) from error

    def evaluate(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Run `forward` without gradients, in eval mode. Collective: call on all ranks."""
        return self._without_gradients(batch, loss)

    def act(self, batch: Batch) -> Tensor:
        """Return the policy's greedy action chunk. Collective: call on all ranks, equally often."""
        return self._without_gradients(batch, action_chunk).float()

    @torch.no_grad()
    def _without_gradients(self, batch: Batch, call: Callable[..., Any]) -> Any:
        self.module.eval()
        result = self._run(batch, call)
        reshard_(self.module)
        return result

    def _autocast(self) -> torch.autocast:
        # The cache of cast weights would outlive the gathered weights.
        enabled = self._dtype != torch.float32
        return torch.autocast(self.device.type, self._dtype, enabled, cache_enabled=False)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient: one reduce-scatter per unit. Collective: call on all ranks."""
        (loss * self.world_size).backward()  # FSDP2 averages over ranks

    def step(self) -> None:
        """Take one optimizer step on the shards. Collective with batch normalisation: call on all ranks."""
        super().step()
        average_running_statistics_(self.module)

    def _local(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks, replicas included: one all-reduce. Collective: call on all ranks."""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Sum over all ranks, and copy to the host. Collective: call on all ranks."""
        return self.sum_over_ranks(values).tolist()

    def shards(self, *, frozen: bool = True) -> Iterator[Shard]:
        """Yield this rank's rows of every parameter; only the first replica yields them."""
        if self.rank >= self._shards:
            return
        for name, parameter, start in self._rows():
            if not (frozen or parameter.requires_grad):
                continue
            master = local(parameter).reshape(-1)
            if master.numel():
                state = read_moments(self.optimizer, parameter)
                yield Shard(name, tuple(parameter.shape), start, master, state)

    def _rows(self) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
        return rows(self.module.policy, self._shard_rank, self._shards)

    @torch.no_grad()
    def load_parameters(self, read: ReadRange) -> None:
        """Set this rank's rows of every parameter, and every persistent buffer."""
        for name, parameter, start in self._rows():
            fill_(local(parameter).view(-1), read, name, start)
        for name, tensor in unique_tensors(self.module.policy).items():
            if not isinstance(tensor, DTensor):
                fill_(tensor.view(-1), read, name, 0)

    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set this rank's rows of the optimizer state."""
        for name, parameter, start in self._rows():
            if parameter.requires_grad:
                step = torch.tensor(float(steps), device=parameter.device)
                parts = [Part(name, start, 0, local(parameter).numel())]
                load_moments(self.optimizer, parameter, parts, read, keys, step)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Wait for all ranks: with gloo, the last fails if the first has exited. Collective."""
        dist.barrier()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
