from craft_ds.cli import run_command
from craft_ds.worlds import WORLDS, teacher_directory
from craft_ds.worlds.tasks import TASKS


def test_worlds_lists_every_world_and_task(capsys):
    run_command("worlds", [])
    printed = capsys.readouterr().out
    for world, tasks in TASKS.items():
        assert world in printed
        assert all(task in printed for task in (*tasks.old, *tasks.new))


def test_every_world_ships_a_teacher():
    assert all((teacher_directory(world) / "config.json").is_file() for world in WORLDS)
