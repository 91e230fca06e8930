import pytest

from craft_ds.cli import run_command
from craft_ds.errors import UserError
from craft_ds.worlds import teacher_directory
from craft_ds.worlds.tasks import TASKS, WITH_TEACHER


def test_worlds_lists_every_world_and_task(capsys):
    run_command("worlds", [])
    printed = capsys.readouterr().out
    for world, tasks in TASKS.items():
        assert world in printed
        assert all(task in printed for task in (*tasks.old, *tasks.new))


def test_teachers_are_shipped_where_they_are_said_to_be():
    assert all((teacher_directory(world) / "config.json").is_file() for world in WITH_TEACHER)
    with pytest.raises(UserError, match="worlds pretrain"):
        teacher_directory("cw10")
