"""DeepSpeed ZeRO-3 behind the engine protocol."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from craft_ds.engines.base import Batch, ReadRange, Shard, fill_
from craft_ds.engines.zero_layout import Zero3Layout, partition_parameters_
from craft_ds.policies.adapter import PolicyWithLoss, TokenLoss


def init_distributed() -> None:
    """Join the process group that the launcher described. Collective: call on all ranks."""
    if not torch.cuda.is_available():
        # Without it DeepSpeed compiles a shared-memory collective for 70 s; gloo gives the same numbers.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def _read_buffers(module: PolicyWithLoss, read: ReadRange) -> Iterator[tuple[str, Tensor]]:
    """Copies of all buffers by their names in `module`; those of the policy's `state_dict` are read."""
    persistent = module.policy.state_dict().keys()
    for name, buffer in module.named_buffers():
        values, key = buffer.detach().clone(), name.removeprefix("policy.")
        if key in persistent:
            values.copy_(read(key, 0, values.numel()).view(values.shape))
        yield name, values


class ZeroEngine:
    """ZeRO-3: parameters, gradients and optimizer state partitioned over all ranks.

    Two complete forward and backward passes run before one step. DeepSpeed accumulates each into one
    flat shard; `take_gradient` copies that shard (4 bytes a parameter / world size, the only memory
    that a retention step adds) and empties it for the second pass.

    Args:
        module: The policy with its loss; its parameters may lie on the meta device.
        read: Reads its parameters and persistent buffers; each rank asks for what it keeps.
        build_optimizer: Makes the optimizer of the policy's parameters, once they are partitioned.
        config: A configuration from `resolve_ds_config`.
    """

    replicas = 1

    def __init__(
        self,
        module: PolicyWithLoss,
        read: ReadRange,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        config: dict[str, Any],
    ):
        self.module = module
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        buffers = dict(_read_buffers(module, read))
        partition_parameters_(module, config)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=build_optimizer(), config=config)
        self.device = self._engine.device
        self._layout = Zero3Layout(self._engine.optimizer, self.rank)
        self.optimizer = self._layout.optimizer
        self._names = {id(p): name for name, p in module.policy.named_parameters()}
        # DeepSpeed casts buffers too: rotary frequencies rounded to bf16 are a radian off at position 500.
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name].to(self.device)
        self.load_parameters(read)

    def forward(self, batch: Batch) -> TokenLoss:
        """Loss of this rank's micro-batch. Collective: call on all ranks."""
        self._engine.train()
        return self._engine(batch)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> TokenLoss:
        """`forward` without gradients, in eval mode. Collective: call on all ranks."""
        self._engine.eval()
        return self._engine(batch)

    @torch.no_grad()
    def act(self, batch: Batch) -> Tensor:
        """The policy's greedy action chunk. Collective: call on all ranks, equally often."""
        # Imported here: no other part of the engine knows how a policy decodes.
        from craft_ds.policies.generation import action_chunk

        self._engine.eval()
        return self._engine(batch, call=action_chunk)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient. Collective: call on all ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient(self) -> Sequence[Tensor]:
        """The flat accumulated shard."""
        return [self._layout.gradient]

    def take_gradient(self) -> Sequence[Tensor]:
        """A copy of the flat shard; the accumulator is emptied for the next pass."""
        taken = [self._layout.gradient.clone()]
        self.drop_gradient()
        return taken

    def step(self) -> None:
        """One optimizer step on the shards. Collective: call on all ranks."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step whose gradient norm was found finite")
        self.drop_gradient()

    def drop_gradient(self) -> None:
        """Empty the accumulator."""
        self._layout.clear_gradient()

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Sum over all ranks: one all-reduce. Collective: call on all ranks."""
        dist.all_reduce(values)
        return values.tolist()

    def shards(self) -> Iterator[Shard]:
        """This rank's part of every parameter, without padding."""
        for part in self._layout.partitions:
            name, shape = self._names[id(part.parameter)], tuple(part.parameter.ds_shape)
            if part.numel:
                master, state = self._layout.master(part), self._layout.state(part)
                yield Shard(name, shape, part.start, master, state)
        for name, parameter, start, values in self._frozen_parts():
            yield Shard(name, tuple(parameter.ds_shape), start, values.float(), {})

    def _frozen_parts(self) -> Iterator[tuple[str, Any, int, Tensor]]:
        for name, parameter in self._layout.frozen(self.module.policy):
            size = parameter.ds_tensor.numel()
            start = self.rank * size
            numel = min(size, max(0, parameter.ds_numel - start))
            if numel:
                yield name, parameter, start, parameter.ds_tensor.detach().reshape(-1)[:numel]

    @torch.no_grad()
    def load_parameters(self, read: ReadRange) -> None:
        """Set this rank's part of every parameter. Collective: call on all ranks."""
        for part in self._layout.partitions:
            if part.numel:
                name = self._names[id(part.parameter)]
                fill_(self._layout.master(part), read, name, part.start)
        for name, _, start, values in self._frozen_parts():
            fill_(values, read, name, start)
        self._layout.publish_masters()

    @torch.no_grad()
    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set this rank's part of the optimizer state."""
        self._layout.create_state(tuple(keys), steps)
        for part in self._layout.partitions:
            if part.numel:
                name = self._names[id(part.parameter)]
                for key, values in self._layout.state(part).items():
                    fill_(values, read, f"{name}.{key}", part.start)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process group. Collective: call on all ranks."""
        self._engine.destroy()
        dist.barrier()
        dist.destroy_process_group()
