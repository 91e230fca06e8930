"""Check craft-ds on one GPU: parity, commands, surgery, speed and memory, in 8 minutes and without a network.

    python benchmarks/gpu_check.py

Parts, each in processes of its own, so that one that fails does not hide the others:
  card      bytes and operations per second that the card reaches
  parity    losses, λ and weights of every engine against one fp32 process on the CPU
  trainer   the commands: anchors, training in every engine, resume, export, evaluation
  surgery   Gram triple and merge against the bandwidth of a copy
  save      checkpoints with fp32 moments, loaded back and compared
  speed     LeRobot's update_policy and craft-ds at full size: seconds, peak memory (and the planner's),
            kernels and host waits of a step

Prints tables in Markdown; writes them and the raw figures to --output. With --device cpu --small the same
code runs on tiny policies without a GPU; its figures mean nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_parts import card, parity, save, speed, surgery, trainer
from harness import OUTPUTS, argument_parser, run_case, serve_case

from craft_ds.cli import run_main
from craft_ds.errors import UserError

PARTS = ("card", "parity", "trainer", "surgery", "save", "speed")
_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "card": card.table,
    "parity": parity.table,
    "trainer": trainer.table,
    "surgery": surgery.table,
    "save": save.table,
    "speed": speed.table,
}
_PART_LIMIT = 200.0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="tiny policies, to try the script")
    add("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    add("--systems", choices=tuple(speed.SYSTEMS), nargs="+", default=list(speed.SYSTEMS))
    add("--layers", type=int, help="layers of decoder and vision tower in the part speed (default: all)")
    add(
        "--minutes",
        type=float,
        default=8.0,
        help="measure no further system after this time (default: 8)",
    )
    add("--output", type=Path, default=OUTPUTS, help="directory of gpu_check.json and gpu_check.md")
    return parser.parse_args()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    match case["part"]:
        case "card":
            return card.run(case["small"])
        case "parity":
            return parity.run(case["small"])
        case "trainer":
            return trainer.run(case["small"])
        case "surgery":
            return surgery.run(case["small"])
        case "save":
            return save.run(case["small"])
        case "plan":
            return speed.plan(case["small"], case["layers"])
        case _:
            return speed.run(case["small"], case["system"], case["layers"])


class Check:
    """The parts of a run and their results, written after each."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._started = time.monotonic()
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        """Run the parts that are not timed, side by side, and then the others, one by one."""
        args = self._args
        with ThreadPoolExecutor() as pool:
            beside = [name for name in ("parity", "trainer") if name in args.parts]
            started: dict[str, Future] = {name: pool.submit(self._measure, part=name) for name in beside}
            if "speed" in args.parts:
                started["plan"] = pool.submit(self._measure, part="plan")
            for name, future in started.items():
                self._keep(name, future.result())
        for name in ("card", "surgery", "save"):
            if name in args.parts:
                self._keep(name, self._measure(part=name))
        if "speed" in args.parts:
            planned, rows = self.results.pop("plan"), []
            del planned["wall_s"]
            for system in args.systems:
                if time.monotonic() - self._started < 60 * args.minutes:
                    result = self._measure(part="speed", system=system)
                else:
                    result = {"error": "no time was left"}
                rows.append({"system": system, **result})
                self._keep("speed", {"rows": rows, "planned": planned, "small": args.small})

    def _measure(self, **case: Any) -> dict[str, Any]:
        args = self._args
        started = time.monotonic()
        try:
            environment = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
            case |= {"small": args.small, "layers": args.layers}
            (result,) = run_case(case, 1, timeout=_PART_LIMIT, environment=environment)
        except UserError as error:
            result = {"error": str(error)}
        return {**result, "wall_s": time.monotonic() - started}

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        seconds = time.monotonic() - self._started
        print(f"[{seconds:.0f} s] {name} done", flush=True)
        output = self._args.output
        output.mkdir(parents=True, exist_ok=True)
        (output / "gpu_check.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (output / "gpu_check.md").write_text("\n".join(self.tables()) + "\n")

    def tables(self) -> list[str]:
        """Return the lines of all tables."""
        lines: list[str] = []
        for name in PARTS:
            result = self.results.get(name)
            if result is not None:
                lines += [f"{name}: {result['error']}"] if "error" in result else _TABLES[name](result)
                lines.append("")
        return lines

    def failed(self) -> list[str]:
        """Return the parts that ended with an error or outside their limits."""
        systems = {row["system"]: row for row in self.results.get("speed", {}).get("rows", [])}
        return [
            name
            for name, result in (self.results | systems).items()
            if "error" in result or not result.get("ok", True)
        ]


def main() -> None:
    serve_case(measure)
    args = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    check = Check(args)
    check.run()
    print("\n".join(check.tables()))
    if failed := check.failed():
        raise UserError(f"failed: {', '.join(failed)}; see {args.output / 'gpu_check.json'}")


if __name__ == "__main__":
    run_main(main)
