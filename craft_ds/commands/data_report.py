"""Report how data sets fit a policy: values outside of its statistics, NaN, token lengths, names, fps.

    craft-ds data-report --policy_path=path/to/teacher --dataset_root=data/new_task
    craft-ds data-report --policy_path=path/to/teacher --dataset_root=data/old --dataset_root=data/new

Several data sets are also compared with the first one. Exit status: 0, or 2 if training cannot be right; the
reasons are printed as errors.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from craft_ds.config.arguments import parse_rename_map
from craft_ds.config.data_report import DataReportConfig
from craft_ds.config.describe import field_documents, first_sentence
from craft_ds.errors import UserError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        prog="craft-ds data-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--policy_path",
        "--policy_repo_id",
        required=True,
        help="policy directory or hub id; no model is built",
    )
    add(
        "--dataset_root",
        action="append",
        default=[],
        help="local directory of a data set; several: the first one is that of the old tasks",
    )
    add(
        "--dataset_repo_id",
        action="append",
        default=[],
        help="hub id of a data set, or its name in the report; as often as --dataset_root, or alone",
    )
    add(
        "--rename_map",
        default="{}",
        help='names in the data set to those in the policy, as JSON: {"observation.images.a": …}',
    )
    add(
        "--json",
        metavar="FILE",
        help="also write the report as JSON; - for standard output instead of the table",
    )
    documents = field_documents(DataReportConfig)
    for entry in fields(DataReportConfig):
        add(
            f"--{entry.name}",
            type=type(entry.default),
            default=entry.default,
            help=f"{first_sentence(documents[entry.name])} (default: {entry.default})".replace("%", "%%"),
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the report that the flags describe."""
    args = parse_arguments(arguments)
    options = DataReportConfig(
        **{entry.name: getattr(args, entry.name) for entry in fields(DataReportConfig)}
    )
    options.validate()
    sources, rename_map = _sources(args), parse_rename_map(args.rename_map)

    # Imported here so that --help and errors in flags are fast.
    from craft_ds.data.data_measure import measure_dataset
    from craft_ds.data.data_report_text import as_json, table
    from craft_ds.data.data_verdicts import compare, judge
    from craft_ds.data.tabular import open_tabular
    from craft_ds.policies.changes import policy_changes
    from craft_ds.policies.loading import load_policy_config, load_processors

    config = load_policy_config(args.policy_path)
    renamed = policy_changes(config, config, rename_map=rename_map)
    preprocessor, postprocessor = load_processors(config, args.policy_path, changes=renamed)
    reports, findings = [], []
    for name, root in sources:
        dataset = open_tabular(name, root)
        reports.append(measure_dataset(dataset, name, config, preprocessor, postprocessor, options))
        findings += judge(reports[-1], options)
    for report in reports[1:]:
        findings += compare(reports[0], report)

    if args.json:
        text = json.dumps(as_json(reports, findings), indent=1, ensure_ascii=False)
        _write(args.json, text + "\n")
    if args.json != "-":
        for report in reports:
            print("\n".join(table(report)) + "\n")
    errors = [finding for finding in findings if finding.level == "error"]
    stream = sys.stderr if args.json == "-" else sys.stdout
    for finding in findings:
        if finding.level == "warning":
            print(f"warning: {finding.text}", file=stream)
    if not errors:
        print(f"ok: no errors, {len(findings)} warning{'s' if len(findings) != 1 else ''}", file=stream)
        return
    for finding in errors:
        print(f"error: {finding.text}", file=sys.stderr)
    raise SystemExit(2)


def _sources(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return the name and the root of each data set."""
    roots, names = args.dataset_root, args.dataset_repo_id
    if not roots and not names:
        raise UserError("--dataset_root is missing: give the directory of a data set, or --dataset_repo_id")
    if roots and names and len(roots) != len(names):
        raise UserError(
            f"{len(names)} times --dataset_repo_id, but {len(roots)} times --dataset_root: give one of each "
            "per data set, or --dataset_root alone"
        )
    if not roots:
        return [(name, None) for name in names]
    return list(zip(names or [Path(root).name or root for root in roots], roots, strict=True))


def _write(file: str, text: str) -> None:
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={file} cannot be written: {error}") from error
