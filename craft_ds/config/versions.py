"""The versions of other packages with which craft-ds was tested."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest

TESTED = {
    "torch": ("2.11", "2.12"),
    "lerobot": ("0.6.1", "0.6.2"),
    "transformers": ("5.5.4", "5.6"),
    "peft": ("0.21.2", "0.22"),
    "deepspeed": ("0.19.8", "0.20"),
    "safetensors": ("0.5", "1"),
}
"""Lowest tested version of each package, and the first version after it that is not tested."""


@dataclass(frozen=True)
class InstalledVersion:
    """A package and its installed version.

    Attributes:
        package: Name on the package index.
        installed: Installed version; None: not installed.
        lowest: Lowest tested version.
        below: First higher version that is not tested.
    """

    package: str
    installed: str | None
    lowest: str
    below: str

    @property
    def tested(self) -> bool:
        """Return whether the installed version lies in the tested range."""
        if self.installed is None:
            return False
        release = _release(self.installed)
        return not _less(release, _release(self.lowest)) and _less(release, _release(self.below))

    def __str__(self) -> str:
        found = "not installed" if self.installed is None else self.installed
        return f"{self.package} {found} (tested: >={self.lowest},<{self.below})"


def installed_versions() -> list[InstalledVersion]:
    """Return the installed version of every package of `TESTED`, without importing any."""
    return [InstalledVersion(name, _installed(name), *bounds) for name, bounds in TESTED.items()]


def untested_versions() -> list[InstalledVersion]:
    """Return the packages that are installed in a version outside the tested range."""
    return [entry for entry in installed_versions() if entry.installed is not None and not entry.tested]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> list[int]:
    """Return the numbers of a version, without its local part or pre-release suffix."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return numbers


def _less(one: list[int], other: list[int]) -> bool:
    pairs = list(zip_longest(one, other, fillvalue=0))
    return [left for left, _ in pairs] < [right for _, right in pairs]
