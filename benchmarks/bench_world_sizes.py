"""Compare the loss curves of the same CRaFT run at every world size, in every engine.

    python benchmarks/bench_world_sizes.py --steps 3 --world_sizes 1 2

A tiny pi0_fast is fine-tuned with the same global batch, anchors and seed on 1 to 4 ranks of this machine,
which the script starts. The output is the largest difference of the task loss and of the retention loss of
any step from those of the single process in fp32.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, argument_parser, hardware, run_case, serve_case, write_result

from craft_ds.anchors.build import BuildOptions, build_anchor_cache
from craft_ds.cli import run_command, run_main
from craft_ds.engines.deepspeed import init_distributed
from craft_ds.errors import UserError
from craft_ds.testing.datasets import make_test_dataset
from craft_ds.testing.policies import make_test_policy_dir

ENGINES = {
    "single": ["--engine=single"],
    "zero3": [f"--ds_config={ROOT / 'ds_configs' / 'zero3.json'}"],
    "fsdp": ["--engine=fsdp"],
}
COMPARED = ("train/loss", "craft/retention_loss", "craft/lambda")


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    add("--global_batch", type=int, default=12, help="samples per step over all ranks (default: 12)")
    add("--world_sizes", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of ranks")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of forward and backward")
    add("--output", type=Path, help="JSON file of the figures (default: in outputs/bench)")
    args = parser.parse_args()
    for world_size in args.world_sizes:
        if args.global_batch % world_size:
            raise UserError(f"--global_batch={args.global_batch} does not divide by {world_size} ranks")
    return args


def make_inputs(root: Path) -> None:
    """Write a policy, data of the new task, data of the old tasks and their anchors."""
    make_test_policy_dir(root / "policy")
    make_test_dataset(root / "old", tasks=2, episodes_per_task=3)
    make_test_dataset(root / "new", tasks=1, episodes_per_task=4, seed=5)
    build_anchor_cache(
        BuildOptions(
            dataset_repo_id="craft-ds/test",
            dataset_root=str(root / "old"),
            policy_path=str(root / "policy"),
            output_dir=str(root / "anchors"),
            num_samples=36,
            num_workers=0,
            heldout_fraction=0.34,
        )
    )


def train(case: dict[str, Any]) -> None:
    """Train in every engine and dtype, on all ranks. Collective."""
    root, world_size = Path(case["root"]), int(os.environ["WORLD_SIZE"])
    batch_size = case["global_batch"] // world_size
    init_distributed()  # once: DeepSpeed does not survive the end of its first process group
    for engine, dtype in itertools.product(engines(world_size), case["dtypes"]):
        arguments = [
            *ENGINES[engine],
            f"--engine.dtype={dtype}",
            f"--policy.path={root / 'policy'}",
            "--policy.device=cpu",
            "--dataset.repo_id=craft-ds/test",
            f"--dataset.root={root / 'new'}",
            f"--output_dir={run_directory(root, engine, dtype, world_size)}",
            f"--steps={case['steps']}",
            f"--batch_size={batch_size}",
            "--num_workers=0",
            "--log_freq=1",
            "--save_checkpoint=false",
            "--craft.enabled=true",
            f"--craft.anchor_cache_dir={root / 'anchors'}",
            f"--craft.anchor_batch_size={batch_size}",
            "--craft.retention_freq=3",
        ]
        sys.argv = ["train_craft.py", *arguments]
        run_command("train", arguments)
    torch.distributed.destroy_process_group()


def engines(world_size: int) -> list[str]:
    return [engine for engine in ENGINES if engine != "single" or world_size == 1]


def run_directory(root: Path, engine: str, dtype: str, world_size: int) -> Path:
    return root / f"{engine}-{dtype}-{world_size}"


def curves(run: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in COMPARED}


def largest_difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def main() -> None:
    serve_case(train)
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_inputs(root)
        for world_size in args.world_sizes:
            case = {"steps": args.steps, "global_batch": args.global_batch, "dtypes": args.dtypes}
            run_case(case | {"root": directory}, world_size, environment={"CUDA_VISIBLE_DEVICES": ""})
        found = {
            run: curves(run_directory(root, *run))
            for world_size in args.world_sizes
            for engine in engines(world_size)
            for run in [(engine, dtype, world_size) for dtype in args.dtypes]
        }
    reference = found["single", "float32", 1]
    print(f"{args.steps} steps, {args.global_batch} samples per step; {hardware()}")
    print("largest difference of any step from the single process in fp32:")
    print(f"{'engine':>7} {'dtype':>9} {'ranks':>6}" + "".join(f"{key:>22}" for key in COMPARED))
    rows = []
    for (engine, dtype, world_size), curve in found.items():
        differences = {key: largest_difference(curve[key], reference[key]) for key in COMPARED}
        figures = "".join(f"{value:>22.1e}" for value in differences.values())
        print(f"{engine:>7} {dtype:>9} {world_size:>6}{figures}")
        rows.append({"engine": engine, "dtype": dtype, "world_size": world_size, **differences})
    losses = reference["train/loss"]
    result = {"hardware": hardware(), **vars(args), "loss": [losses[0], losses[-1]], "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(result | {"output": str(args.output)}))
    else:
        write_result("bench_world_sizes", result)


if __name__ == "__main__":
    run_main(main)
