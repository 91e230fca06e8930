"""Tested versions of other packages."""

import tomllib
from pathlib import Path

import pytest

from craft_ds.config.versions import TESTED, InstalledVersion, installed_versions, untested_versions


@pytest.mark.parametrize(
    ("installed", "tested"),
    [
        ("0.6.1", True),
        ("0.6.1+cpu", True),
        ("0.6.1.post1", True),
        ("0.6.2", False),
        ("0.6.0", False),
        ("0.6", False),
        ("1.0", False),
        (None, False),
    ],
)
def test_range_includes_its_lowest_version_and_not_its_bound(installed, tested):
    assert InstalledVersion("lerobot", installed, ">=0.6.1,<0.6.2").tested is tested


def test_dependencies_have_the_tested_ranges():
    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = [*content["dependencies"], *content["optional-dependencies"]["deepspeed"]]
    for name, tested in TESTED.items():
        assert any(line.split("[")[0].split(">")[0] == name and line.endswith(tested) for line in wanted), (
            name
        )


def test_installed_packages_are_listed():
    assert [entry.package for entry in installed_versions()] == list(TESTED)


def test_untested_version_is_reported(monkeypatch):
    monkeypatch.setattr("craft_ds.config.versions._installed", {"lerobot": "0.6.2"}.get)
    assert [str(entry) for entry in untested_versions()] == ["lerobot 0.6.2 (tested: >=0.6.1,<0.6.2)"]
