"""Check what this machine needs for training: say what will not work and how to fix it.

    craft-ds doctor --output_dir outputs

Each check is ok, a warning (works, with limits) or a problem (will not work). Exit status: 0, or 1 after a
problem.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="craft-ds doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs"),
        help="where runs will be written; its disk and file system are checked (default: outputs)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(arguments)

    from craft_ds.commands.doctor_checks import PROBLEM, WARNING, run_checks  # late: imports torch

    findings = []
    for finding in run_checks(args.output_dir):
        findings.append(finding)
        if not args.json:
            print(f"{finding.status:<9}{finding.name:<16}{finding.detail}", flush=True)
            if finding.fix:
                print(f"{'':<9}{'':<16}fix: {finding.fix}", flush=True)
    counts = {status: sum(one.status == status for one in findings) for status in (PROBLEM, WARNING)}
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"{counts[PROBLEM]} problem(s), {counts[WARNING]} warning(s)")
    if counts[PROBLEM]:
        raise SystemExit(1)
