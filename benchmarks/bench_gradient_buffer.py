"""Compare the places in which g_t waits during the second pass: bytes, seconds of surgery, and the loss.

    python benchmarks/bench_gradient_buffer.py

Surgery (storing g_t, triple, merge) is timed on gradients of random numbers, the places in turn. The loss is
that of the shipped teacher, fine-tuned in one process with a retention step every time, on four batches of
random images and tokens and four other ones as anchors; every step projects. On a GPU, if there is one; on a
CPU, `cpu` is one more copy in the same memory.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import get_args

import torch
from harness import (
    CRAFT,
    argument_parser,
    batches,
    default_device,
    hardware,
    run_case,
    serve_case,
    teacher_engine,
    write_result,
)

from craft_ds.algorithm.gram import gram, merge_
from craft_ds.cli import run_main
from craft_ds.config.craft_config import GradientBuffer
from craft_ds.engines.gradient_buffer import buffered
from craft_ds.training.train_step import retention_step

BUFFERS = get_args(GradientBuffer)
BYTES = {"device": 4, "bf16": 2, "cpu": 0}
KEEPING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Makes glibc keep freed memory: else the page faults of temporaries are most of what is measured."""


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--elements", type=int, default=1 << 25, help="of the timed gradient (default: 2^25)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions (default: 7)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the policy (default: 50)")
    return parser.parse_args()


def seconds(elements: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of surgery by buffer, with 48 tensors as FSDP2 has units."""
    size = -(-elements // 48)
    task, retention = ([torch.randn(size, device=default_device()) for _ in range(48)] for _ in range(2))
    found: dict[GradientBuffer, list[float]] = {buffer: [] for buffer in BUFFERS}
    for repeat in range(repeats + 1):
        for buffer, times in found.items():
            began = time.perf_counter()
            held = buffered(task, buffer)
            gram(held, retention).tolist()
            merge_(retention, held, 1e-9, 1.0 - 1e-9)
            if default_device().type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times.append(time.perf_counter() - began)
    return {buffer: statistics.median(times) for buffer, times in found.items()}


def losses(buffer: GradientBuffer, steps: int) -> torch.Tensor:
    """Return the task loss of every step."""
    engine = teacher_engine(3e-4)
    task, anchors = ([batches(engine, 4, first + seed) for seed in range(4)] for first in (0, 100))
    craft = replace(CRAFT, gradient_buffer=buffer)
    found = []
    for step in range(steps):
        result = retention_step(
            engine,
            task=task[step % 4],
            anchors=anchors[step % 4],
            constraint=None,
            multiplier=1.0,
            craft=craft,
            max_norm=1.0,
        )
        found.append(result.loss)
    return torch.tensor(found)


def main() -> None:
    serve_case(lambda case: seconds(**case))
    args = parse_arguments()
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else hardware()
    torch.set_num_threads(1)
    case = {"elements": args.elements, "repeats": args.repeats}
    times = run_case(case, 1, environment=KEEPING_ALLOCATOR)[0]
    curves = {buffer: losses(buffer, args.steps) for buffer in BUFFERS}
    exact = curves["device"]
    fall = (exact[:4].mean() - exact[-4:].mean()).item()
    rows = [
        {
            "buffer": buffer,
            "device_bytes": BYTES[buffer],
            "seconds": times[buffer],
            "first_loss": curves[buffer][0].item(),
            "last_loss": curves[buffer][-4:].mean().item(),
            "difference": ((curves[buffer] - exact).abs().mean() / fall).item(),
        }
        for buffer in BUFFERS
    ]
    print(f"{device}; {args.elements / 1e6:.1f} M elements; {args.steps} retention steps of the teacher")
    print(f"{'buffer':<8}{'bytes':>6}{'surgery':>12}{'loss':>18}{'difference / fall':>20}")
    for row in rows:
        print(
            f"{row['buffer']:<8}{row['device_bytes']:6}{row['seconds'] * 1e3:9.1f} ms"
            f"{row['first_loss']:10.3f}→{row['last_loss']:.3f}{row['difference']:16.1e}"
        )
    write_result("bench_gradient_buffer", {"hardware": device, "rows": rows})


if __name__ == "__main__":
    run_main(main)
