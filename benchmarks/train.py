"""Compare steps of craft-ds with what a user would take instead, each pair in turn in one run.

    python benchmarks/train.py                     # every comparison
    python benchmarks/train.py --parts surgery     # a single comparison

Prints one table of ratios: retention steps against plain ones, surgery against the
guide's procedure and TorchJD, and steps without CRaFT against a plain loop of FSDP2. Intervals are
95 % over repeats. FLOPs, memory and sent bytes do not depend on the machine and are counted by
`bench_pass_memory.py` and `bench_traffic.py`.
"""

import argparse
from typing import Any

from harness import argument_parser, hardware, run_case, serve_case, write_result

from craft_ds.cli import run_main

PARTS = ("steps", "surgery", "loops")


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="comparisons to run (default: all)")
    add("--repeats", type=int, default=15, help="timed repeats (default: 15; twice in loops)")
    add("--elements", type=int, default=50_000_000, help="of the gradients of surgery (default: 50 million)")
    add("--batch_size", type=int, default=2, help="samples per step (default: 2)")
    return parser.parse_args()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in a rank."""
    match case["part"]:
        case "steps":
            from train_parts import steps as part
        case "surgery":
            from train_parts import surgery as part
        case _:
            from train_parts import loops as part
    return part.measure(case)


def shown(values: list[float]) -> str:
    """Return a ratio with its interval."""
    mean, half = values
    return f"{mean:.2f} ± {half:.2f}"


def run_steps(args: argparse.Namespace) -> dict[str, Any]:
    case = {"part": "steps", "repeats": args.repeats, "batch_size": args.batch_size}
    found = run_case(case, 1, environment={})[0]
    names = {
        "projection": "with projection",
        "heldout": "and held-out anchors",
        "one_gradient": "one gradient",
    }
    for name, label in names.items():
        print(f"| retention step, {label} | plain step | {shown(found['to_plain'][name])} times as long |")
        print(f"| mean step at K = 5, {label} | plain step | {found['mean_of_5'][name]:.2f} times as long |")
    print(f"| retention step with projection | its passes | {shown(found['beyond_passes'])} times as long |")
    return found


def run_surgery(args: argparse.Namespace) -> dict[str, Any]:
    case = {"part": "surgery", "repeats": args.repeats, "elements": args.elements}
    found = run_case(case, 1, environment={})[0]
    for row in found["rows"]:
        memory = {name: f"{value:.2f}" for name, value in row["extra_gradients"].items()}
        for name, label in (("guide", "the guide's procedure"), ("torchjd", "TorchJD")):
            print(
                f"| surgery, {row['layout']}, {row['elements'] / 1e6:.0f} M | {label} | "
                f"{shown(row[f'{name}_to_ours'])} times as fast; gradients allocated: {memory['ours']} "
                f"against {memory[name]} |"
            )
    return found


def run_loops(args: argparse.Namespace) -> dict[str, Any]:
    case = {"part": "loops", "repeats": 2 * args.repeats, "batch_size": 1}
    found: dict[str, Any] = run_case(case, 2, environment={}, timeout=1800)[0]
    print(f"| step without CRaFT, 2 ranks | plain loop of FSDP2 | {shown(found['speed'])} times as fast |")
    return found


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    print(f"{hardware()}\n\n| craft-ds | against | |\n|---|---|---|", flush=True)
    runs = {"steps": run_steps, "surgery": run_surgery, "loops": run_loops}
    results = {name: runs[name](args) for name in PARTS if name in args.parts}
    write_result("train", {"hardware": hardware(), **vars(args), "results": results})


if __name__ == "__main__":
    run_main(main)
