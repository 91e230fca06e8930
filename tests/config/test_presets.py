"""`--craft.preset`: only a set of flags, which the user's own replace."""

import sys

import pytest
import yaml

from craft_ds.config.craft_config import CraftConfig
from craft_ds.config.parser import parse_arguments
from craft_ds.config.penalty import PenaltyConfig
from craft_ds.config.presets import PRESETS, expand_preset, preset_line
from craft_ds.errors import UserError

OWN = ["--dataset.repo_id=a/b", "--craft.anchor_cache_dir=cache"]


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["craft-ds"])


def method(config):
    """Return what presets set."""
    return {
        flag: getattr(getattr(config, flag.split(".")[0]), flag.split(".")[1])
        for flag in PRESETS["guide"].flags
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_flags(name):
    config = parse_arguments([f"--craft.preset={name}", *OWN])
    assert method(config) == PRESETS[name].flags
    config.craft.validate()
    config.penalty.validate(config.craft)


def test_presets_are_what_their_names_say():
    flags = {name: preset.flags for name, preset in PRESETS.items()}
    guide = parse_arguments([*OWN, "--craft.enabled=true"])
    assert guide.craft == CraftConfig(enabled=True, anchor_cache_dir="cache")
    assert method(guide) == flags["guide"]
    assert guide.penalty == PenaltyConfig()
    assert [name for name in flags if not flags[name]["craft.enabled"]] == ["sequential", "l2", "ewc"]
    for name, loss in (("replay", "token_ce"), ("kl", "teacher_kl")):
        config = parse_arguments([f"--craft.preset={name}", *OWN]).craft
        assert (config.multiplier, config.initial_lambda, config.retention_freq) == ("fixed", 1.0, 1)
        assert (config.use_grad_projection, config.merging, config.retention_loss) == (False, "guide", loss)
    assert flags["recommended"] == flags["kl"]


@pytest.mark.parametrize("flags", [["--craft.retention_freq=5"], ["--craft.retention_freq", "5"]])
@pytest.mark.parametrize("first", [True, False])
def test_the_users_flag_wins(flags, first):
    preset = ["--craft.preset=replay"]
    config = parse_arguments([*OWN, *(flags + preset if first else preset + flags)])
    assert config.craft.retention_freq == 5  # as in the guide's defaults, but given
    assert config.craft.multiplier == "fixed"


def test_the_last_preset_counts():
    config = parse_arguments(["--craft.preset=agem", *OWN, "--craft.preset=replay"])
    assert method(config) == PRESETS["replay"].flags


def test_explicit_values_of_a_file_win_over_its_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: {repo_id: a/b}\ncraft: {preset: replay, retention_freq: 5}\n")
    config = parse_arguments([f"--config_path={path}"])
    assert method(config) == PRESETS["replay"].flags | {"craft.retention_freq": 5}
    # The command line wins over both, and its preset over the file's values.
    config = parse_arguments([f"--config_path={path}", "--craft.initial_lambda=0.5"])
    assert (config.craft.initial_lambda, config.craft.retention_freq) == (0.5, 5)
    config = parse_arguments([f"--config_path={path}", "--craft.preset=agem"])
    assert method(config) == PRESETS["agem"].flags


def test_a_saved_configuration_is_the_same_method(tmp_path):
    config = parse_arguments(["--craft.preset=kl", *OWN])
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml())
    assert "preset: kl" not in config.to_yaml()
    assert method(parse_arguments([f"--config_path={path}"])) == PRESETS["kl"].flags
    # A preset in the file changes nothing that the file says.
    content = yaml.safe_load(path.read_text())
    content["craft"]["preset"] = "sequential"
    path.write_text(yaml.safe_dump(content))
    assert method(parse_arguments([f"--config_path={path}"])) == PRESETS["kl"].flags


@pytest.mark.parametrize(("name", "says"), [("replai", "did you mean replay? Choose"), ("", "choose one of")])
def test_an_unknown_name_is_refused(tmp_path, name, says):
    path = tmp_path / "run.yaml"
    path.write_text(f"craft: {{preset: '{name}'}}\n")
    for arguments in ([f"--craft.preset={name}"], [f"--config_path={path}"]):
        with pytest.raises(UserError) as error:
            parse_arguments(arguments)
        assert f"--craft.preset={name}: {says}" in str(error.value)


@pytest.mark.parametrize("name", ["sequential", "l2", "ewc"])
def test_a_flag_of_craft_is_refused_by_presets_without_craft(name):
    for flag in ("merging=cagrad", "anchor_batch_size=4"):
        with pytest.raises(
            UserError, match=f"--craft.{flag.split('=')[0]} has no effect with --craft.preset={name}"
        ):
            expand_preset([f"--craft.preset={name}", *OWN, f"--craft.{flag}"])
        given = [f"--craft.preset={name}", *OWN, f"--craft.{flag}"]
        assert expand_preset([*given, "--craft.enabled=true"])[-1] == "--craft.enabled=true"


@pytest.mark.parametrize("name", ["sequential", "l2", "ewc"])
def test_so_is_one_in_a_file(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(f"craft: {{preset: {name}, merging: cagrad, anchor_cache_dir: cache}}\n")
    with pytest.raises(UserError, match=f"--craft.merging has no effect with --craft.preset={name}"):
        parse_arguments([f"--config_path={path}"])


def test_the_line_names_the_flags_that_were_set(tmp_path):
    line = preset_line(["--craft.preset=replay", "--craft.retention_freq=5"])
    assert line.startswith("preset replay: --craft.enabled=true --craft.retention_loss=token_ce")
    assert "--craft.use_grad_projection=false" in line
    assert line.endswith("; your own: --craft.retention_freq")
    path = tmp_path / "run.yaml"
    path.write_text("craft: {preset: replay, retention_freq: 5}\n")
    assert preset_line([f"--config_path={path}"]) == line
    assert preset_line(["--steps=1"]) is None


def test_expanding_twice_changes_nothing():
    once = expand_preset(["--craft.preset=l2", *OWN])
    assert expand_preset(once) == once
    assert once[-len(OWN) :] == OWN
