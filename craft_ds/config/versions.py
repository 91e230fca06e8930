"""The versions of other packages with which craft-ds was tested."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED = {
    "torch": ">=2.11,<2.12",
    "lerobot": ">=0.6.1,<0.6.2",
    "transformers": ">=5.5.4,<5.6",
    "peft": ">=0.21.2,<0.22",
    "deepspeed": ">=0.19.8,<0.20",
    "safetensors": ">=0.5,<1",
}
"""Tested range of each package."""


@dataclass(frozen=True)
class InstalledVersion:
    """A package and its installed version.

    Attributes:
        package: Name on the package index.
        installed: Installed version; None: not installed.
        tested_range: Versions that were tested.
    """

    package: str
    installed: str | None
    tested_range: str

    @property
    def tested(self) -> bool:
        """True if the installed version is in the tested range."""
        if self.installed is None:
            return False
        return SpecifierSet(self.tested_range).contains(self.installed, prereleases=True)

    def __str__(self) -> str:
        found = "not installed" if self.installed is None else self.installed
        return f"{self.package} {found} (tested: {self.tested_range})"


def installed_versions() -> list[InstalledVersion]:
    """Return the installed version of every package of `TESTED`, without importing any."""
    return [InstalledVersion(name, _installed(name), tested) for name, tested in TESTED.items()]


def untested_versions() -> list[InstalledVersion]:
    """Return the packages that are installed in a version outside the tested range."""
    return [entry for entry in installed_versions() if entry.installed is not None and not entry.tested]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
