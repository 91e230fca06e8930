"""Compare steps of craft-ds with what a user would take instead, each pair in turn in one run.

    python benchmarks/train.py                     # every comparison
    python benchmarks/train.py --parts surgery     # a single comparison

Prints one table of ratios: passes against LeRobot's, retention steps against plain ones, surgery against the
guide's procedure and TorchJD, and steps without CRaFT against plain loops of FSDP2 and ZeRO-3. Intervals are
95 % over repeats. FLOPs, memory and sent bytes do not depend on the machine and are counted by
`bench_pass_memory.py` and `bench_traffic.py`.
"""

import argparse
from typing import Any

from harness import argument_parser, hardware, run_case, serve_case, write_result

from craft_ds.cli import run_main

PARTS = ("steps", "surgery", "loops", "lerobot")


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="comparisons to run (default: all)")
    add("--repeats", type=int, default=15, help="timed repeats (default: 15; twice in loops)")
    add("--elements", type=int, default=50_000_000, help="of the gradients of surgery (default: 50 million)")
    add("--batch_size", type=int, default=2, help="samples per step (default: 2)")
    add("--layers", type=int, default=2, help="layers in the part lerobot (default: 2)")
    add("--rounds", type=int, default=2, help="processes of each system in the part lerobot (default: 2)")
    return parser.parse_args()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in a rank."""
    match case["part"]:
        case "steps":
            from train_parts import steps as part
        case "surgery":
            from train_parts import surgery as part
        case "loops":
            from train_parts import loops as part
        case _:
            from train_parts import lerobot as part
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
    results = {}
    for kind, label in (("fsdp", "FSDP2"), ("zero3", "ZeRO-3")):
        case = {"part": "loops", "kind": kind, "repeats": 2 * args.repeats, "batch_size": 1}
        found = results[kind] = run_case(case, 2, environment={}, timeout=1800)[0]
        print(
            f"| step without CRaFT, 2 ranks | plain loop of {label} | {shown(found['speed'])} times as fast |"
        )
    return results


def run_lerobot(args: argparse.Namespace) -> dict[str, Any]:
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for system in ("lerobot", "craft"):
            case = {"part": "lerobot", "system": system, "layers": args.layers, "threads": 2, "repeats": 2}
            found = run_case(case | {"batch_size": 1}, 1, environment={}, timeout=1800)[0]
            least = best.setdefault(system, found)
            best[system] = {name: min(value, least[name]) for name, value in found.items()}
    for name, theirs in best["lerobot"].items():
        ours = best["craft"][name]
        print(
            f"| forward and backward, {name} cameras | LeRobot | {theirs / ours:.2f} times as fast "
            f"({theirs:.1f} and {ours:.1f} s) |"
        )
    return best


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    print(f"{hardware()}\n\n| craft-ds | against | |\n|---|---|---|", flush=True)
    runs = {"steps": run_steps, "surgery": run_surgery, "loops": run_loops, "lerobot": run_lerobot}
    results = {name: runs[name](args) for name in PARTS if name in args.parts}
    write_result("train", {"hardware": hardware(), **vars(args), "results": results})


if __name__ == "__main__":
    run_main(main)
