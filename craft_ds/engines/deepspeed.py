"""DeepSpeed ZeRO-2 and ZeRO-3 behind the engine protocol."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from craft_ds.config.craft_config import GradientBuffer
from craft_ds.distributed.collectives import init_process_group
from craft_ds.distributed.env import RANK_TIMEOUT_S, set_local_rank
from craft_ds.engines.base import Batch, ReadRange, Shard, fill_
from craft_ds.engines.batch_norm import average_running_statistics_
from craft_ds.engines.deepspeed_cpu_adam import cpu_adam
from craft_ds.engines.fused_adam import fuse_
from craft_ds.engines.zero2_shards import Zero2Shards, without_broadcast
from craft_ds.engines.zero3_shards import Zero3Shards, partition_parameters_
from craft_ds.engines.zero_shards import ZeroShards
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.pi0_fast.generation import action_chunk
from craft_ds.policies.token_loss import Loss, PolicyWithLoss, TokenLoss, token_loss


def init_distributed(rank_timeout: float = RANK_TIMEOUT_S) -> None:
    """Initialise the process group and DeepSpeed; arguments as for `init_process_group`. Collective."""
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed compiles a shared-memory collective for 70 s; gloo gives the same numbers.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init_process_group(rank_timeout)
    set_local_rank()
    deepspeed.init_distributed(verbose=False)


def _read_buffers(module: PolicyWithLoss, read: ReadRange) -> dict[str, Tensor]:
    """Return copies of all buffers by name; those in the policy's `state_dict` are read from the file."""
    persistent = module.policy.state_dict().keys()
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    for name, values in buffers.items():
        key = name.removeprefix("policy.")
        if key in persistent:
            fill_(values.view(-1), read, key, 0)
    return buffers


def _cast_inputs_of_norms(module: nn.Module) -> None:
    """Give normalisations inputs of their weights' dtype, which autocast does on accelerators only."""

    def cast(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(values.to(norm.weight.dtype) for values in inputs)

    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.GroupNorm) and part.weight is not None:
            part.register_forward_pre_hook(cast)


class DeepSpeedEngine:
    """DeepSpeed ZeRO-3: parameters, gradients and optimizer state partitioned; ZeRO-2: all but parameters.

    Two complete forward and backward passes run before one step. DeepSpeed accumulates each into shards,
    which `take_gradient` empties for the second pass. The returned gradient is the only memory that a
    retention step
    adds: 4 bytes per trainable parameter / world size, and none if DeepSpeed offloads the optimizer of an
        fp32 model or of ZeRO-3, which has an unused second buffer.

    Args:
        module: The policy with its loss; its parameters may be on the meta device.
        read: Reads its parameters and persistent buffers; each rank reads the part it keeps.
        build_optimizer: Builds the optimizer after the parameters are partitioned.
        config: A configuration from `resolve_ds_config`.

    Raises:
        UserError: The optimizer cannot be offloaded as the configuration asks.
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
        stage = config["zero_optimization"]["stage"]
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        # DeepSpeed casts parameters, but not what a policy computes between them; pi0_fast does so itself.
        self._autocast = dtype != torch.float32 and not isinstance(module.policy, PI0FastPolicy)
        buffers = _read_buffers(module, read)
        if stage == 3:
            partition_parameters_(module, config, dtype)
        else:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            materialize_(module, get_accelerator().current_device_name())
        optimizer = build_optimizer()
        optimizer = cpu_adam(optimizer) if config["zero_force_ds_cpu_optimizer"] else fuse_(optimizer)
        with without_broadcast() if stage == 2 else nullcontext():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.device = self._engine.device
        if self._autocast and self.device.type == "cpu":
            _cast_inputs_of_norms(module)
        self._layout: ZeroShards
        if stage == 3:
            self._layout = Zero3Shards(self._engine.optimizer, module.policy)
        else:
            self._layout = Zero2Shards(self._engine.optimizer, module.policy, self.rank, self.world_size)
        self.optimizer = self._layout.optimizer
        # DeepSpeed also casts buffers: rotary frequencies rounded to bf16 are a radian off at position 500.
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name].to(self.device)
        self.load_parameters(read)

    def forward(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Return the loss of this rank's micro-batch. Collective: call on all ranks."""
        self._engine.train()
        return self._run(batch, loss)

    def _run(self, batch: Batch, call: Callable[[PreTrainedPolicy, Batch], Any]) -> Any:
        def run(policy: PreTrainedPolicy, _: Batch) -> Any:
            # Entered here, since DeepSpeed disables autocast around its forward.
            with torch.autocast(self.device.type, torch.bfloat16, self._autocast, cache_enabled=False):
                return call(policy, batch)

        # ZeRO-3 would replace the tensors of an argument, and masks would lose what `on_host` returns.
        return self._engine({}, call=run)

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: Loss = token_loss) -> TokenLoss:
        """Run `forward` without gradients, in eval mode. Collective: call on all ranks."""
        self._engine.eval()
        return self._run(batch, loss)

    @torch.no_grad()
    def act(self, batch: Batch) -> Tensor:
        """Return the policy's greedy action chunk. Collective: call on all ranks, equally often."""
        self._engine.eval()
        return self._run(batch, action_chunk).float()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient. Collective: call on all ranks."""
        self._engine.set_gradient_accumulation_boundary(self._layout.boundary(last))
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def gradient(self) -> Sequence[Tensor]:
        """Return the accumulated shards, flat or one tensor per parameter."""
        return self._layout.gradient()

    def take_gradient(self, buffer: GradientBuffer = "device") -> Sequence[Tensor]:
        """Return the accumulated shards or copies of them, and clear the accumulator."""
        return self._layout.take_gradient(buffer)

    def by_parameter(self, gradient: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Return this rank's parts of a gradient with the names of their parameters, without padding."""
        return self._layout.by_parameter(gradient)

    def masters(self) -> Sequence[Tensor]:
        """Return this rank's part of the fp32 master weights, flat or one tensor per parameter."""
        return self._layout.aligned_masters()

    def step(self) -> None:
        """Take one optimizer step on the shards. Collective: call on all ranks."""
        self._layout.prepare_step()
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped a step whose gradient norm was found finite")
        average_running_statistics_(self.module)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the accumulator."""
        self._layout.clear_gradient()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks: one all-reduce. Collective: call on all ranks."""
        dist.all_reduce(values)
        return values

    def sum_scalars(self, values: Tensor) -> list[float]:
        """Sum over all ranks, and copy to the host. Collective: call on all ranks."""
        return self.sum_over_ranks(values).tolist()

    def shards(self, *, frozen: bool = True) -> Iterator[Shard]:
        """Yield this rank's part of every parameter, without padding."""
        masters = self._layout.masters
        for part in self._layout.partitions:
            yield Shard(part.name, part.shape, part.start, part.of(masters), self._layout.state(part))
        for rest in self._layout.frozen_parts() if frozen else ():
            yield Shard(rest.name, rest.shape, rest.start, rest.values, {})

    @torch.no_grad()
    def load_parameters(self, read: ReadRange) -> None:
        """Set this rank's part of every parameter. Collective: call on all ranks."""
        self._layout.load_frozen(read)
        self._layout.load_masters(read)
        self._layout.copy_masters_to_params()

    def load_optimizer(self, read: ReadRange, keys: Sequence[str], steps: int) -> None:
        """Set this rank's part of the optimizer state."""
        self._layout.load_state(read, keys, steps)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Release model and optimizer after all ranks are done. Collective: call on all ranks."""
        self._engine.destroy()
        dist.barrier()
