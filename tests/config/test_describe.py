"""Descriptions of the flags."""

import subprocess
import sys

from craft_ds.config.describe import describe_flags, first_sentence


def all_flags():
    return {entry.flag: entry for group in describe_flags() for entry in group.flags}


def test_every_flag_has_a_line():
    flags = all_flags()
    assert len(flags) > 50
    assert [flag for flag, entry in flags.items() if not entry.line] == []


def test_groups_have_titles_and_prefixes():
    groups = {group.prefix: group for group in describe_flags()}
    assert {"--", "--craft.", "--engine.", "--engine.fsdp.", "--lora.", "--world.", "--checkpoint."} <= set(
        groups
    )
    assert all(group.title for group in groups.values())
    assert all(flag.flag.startswith(prefix) for prefix, group in groups.items() for flag in group.flags)


def test_choices_and_defaults_are_those_of_the_fields():
    flags = all_flags()
    assert flags["--craft.projection_mode"].choices == ("weighted", "equal", "task_priority")
    assert flags["--craft.enabled"].default == "false"
    assert flags["--engine.ds_config"].default == "null"
    assert flags["--rank_timeout"].default == "600.0"
    assert flags["--craft.retention_freq"].type == "int"


def test_first_sentence_ends_at_a_full_stop():
    assert first_sentence("Bound of 1.5 at most. More of it.") == "Bound of 1.5 at most"
    assert first_sentence("One line.") == "One line"


def test_describing_imports_neither_torch_nor_lerobot():
    program = (
        "import sys; from craft_ds.config.describe import describe_flags; describe_flags();"
        "sys.exit(bool({'torch', 'lerobot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
