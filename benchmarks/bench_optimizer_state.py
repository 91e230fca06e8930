"""Compare the formats of Adam's moments: bytes, seconds per step of the optimizer, and the loss of a policy.

    python benchmarks/bench_optimizer_state.py

Each step is timed on tensors of random numbers, the formats in turn. The loss is that of the shipped teacher,
fine-tuned in one process on four batches of random images and tokens in turn.
"""

import argparse
import statistics
import time
from typing import get_args

import torch
from harness import argument_parser, batches, hardware, teacher_engine, write_result

from craft_ds.cli import run_main
from craft_ds.config.configs import OptimizerState
from craft_ds.engines.compact_adam import compact
from craft_ds.engines.moment_formats import moment_bytes
from craft_ds.training.train_step import task_step

STATES = get_args(OptimizerState)


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--tensors", type=int, default=8, help="tensors of 2048 x 2048 (default: 8)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps (default: 7)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the policy (default: 50)")
    return parser.parse_args()


def seconds(tensors: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of an optimizer step by format."""
    found: dict[str, list[float]] = {state: [] for state in STATES}
    optimizers = {}
    for state in STATES:
        parameters = [torch.nn.Parameter(torch.randn(2048, 2048)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizers[state] = compact(torch.optim.AdamW(parameters, fused=True), state)
    for repeat in range(repeats + 1):
        for state, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if repeat:
                found[state].append(time.perf_counter() - began)
    return {state: statistics.median(times) for state, times in found.items()}


def losses(state: str, steps: int) -> torch.Tensor:
    """Return the loss of every step."""
    engine = teacher_engine(3e-4, state)
    cycle = [batches(engine, 4, seed) for seed in range(4)]
    return torch.tensor([task_step(engine, cycle[step % 4], 1.0).loss for step in range(steps)])


def main() -> None:
    args = parse_arguments()
    times = seconds(args.tensors, args.repeats)
    curves = {state: losses(state, args.steps) for state in STATES}
    exact = curves["fp32"]
    fall = (exact[:4].mean() - exact[-4:].mean()).item()
    elements = args.tensors << 22
    rows = [
        {
            "state": state,
            "bytes": moment_bytes(state, elements) / elements,
            "seconds": times[state],
            "first_loss": curves[state][0].item(),
            "last_loss": curves[state][-4:].mean().item(),
            "difference": ((curves[state] - exact).abs().mean() / fall).item(),
        }
        for state in STATES
    ]
    print(f"{hardware()}; {elements / 1e6:.1f} M elements; {args.steps} steps of the teacher")
    print(f"{'moments':<9}{'bytes':>7}{'step':>10}{'loss':>16}{'difference / fall of fp32':>28}")
    for row in rows:
        print(
            f"{row['state']:<9}{row['bytes']:7.2f}{row['seconds'] * 1e3:7.0f} ms"
            f"{row['first_loss']:8.3f}→{row['last_loss']:.3f}{row['difference']:24.1e}"
        )
    write_result("bench_optimizer_state", {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    run_main(main)
