"""Results of the fault tests per case: printed at the end and written as JSON."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class FaultTable:
    """Results: one row per kind of fault and group, one entry per case.

    A test records a case by `record`, or runs it within `case`; a loop over many cases runs each within
    `Series.case`, so that a failure does not hide the rest.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)

    def record(self, kind: str, group: str, name: str, *, held: bool, **details: Any) -> None:
        """Record one case.

        Args:
            kind: Kind of fault, `kill -9` or `damage`.
            group: Its target, `fsdp` or `manifest.json`; kind and group make a row of the table.
            name: The case.
            held: True if the case passed.
            **details: Plain values for the JSON file.
        """
        self.entries.append({"kind": kind, "group": group, "name": name, "held": held, **details})

    @contextmanager
    def case(self, kind: str, group: str, name: str) -> Iterator[dict[str, Any]]:
        """Run one case, which passes if nothing is raised. Yields a dictionary for details."""
        details: dict[str, Any] = {}
        try:
            yield details
        except BaseException:
            self.record(kind, group, name, held=False, **details)
            raise
        self.record(kind, group, name, held=True, **details)

    def series(self, kind: str, group: str) -> "Series":
        """Return a series for many cases in one test."""
        return Series(self, kind, group)

    def rows(self) -> list[dict[str, Any]]:
        """Return the numbers of cases and passed cases, by kind and group."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for entry in self.entries:
            key = entry["kind"], entry["group"]
            row = found.setdefault(key, {"kind": key[0], "group": key[1], "cases": 0, "held": 0})
            row["cases"] += 1
            row["held"] += entry["held"]
        return [found[key] for key in sorted(found)]

    def lines(self) -> list[str]:
        """Return the lines of the table."""
        rows = self.rows()
        width = max([len(row["kind"]) for row in rows], default=0) + 2
        other = max([len(row["group"]) for row in rows], default=0) + 2
        return [
            f"{row['kind']:<{width}}{row['group']:<{other}}{row['held']:>4} of {row['cases']:<4}"
            + ("" if row["held"] == row["cases"] else " FAILED")
            for row in rows
        ]

    def write(self, path: Path, **context: Any) -> None:
        """Write rows and cases as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**context, "rows": self.rows(), "cases": self.entries}, indent=1) + "\n")


@dataclass
class Series:
    """Cases of one row; all are run before a failure is raised."""

    table: FaultTable
    kind: str
    group: str
    _failures: list[str] = field(default_factory=list)

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Run one case and keep its exception for `check`."""
        try:
            with self.table.case(self.kind, self.group, name) as details:
                yield details
        except Exception:
            self._failures.append(f"{self.kind}, {self.group}: {name}\n{traceback.format_exc()}")

    def check(self) -> None:
        """Raise an error that lists the failed cases."""
        assert not self._failures, f"{len(self._failures)} cases failed\n\n" + "\n".join(self._failures)
