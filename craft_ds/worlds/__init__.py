"""Embedded worlds: small simulated robot tasks, with demonstrations and shipped teachers."""

import subprocess
import sys
from pathlib import Path

from craft_ds.errors import UserError
from craft_ds.worlds.base import Observation, World
from craft_ds.worlds.tasks import RENDERED, WITH_TEACHER, WORLDS

_RENDER_PROBE = """
from craft_ds.worlds.metaworld import MetaWorld
world = MetaWorld()
world.reset(MetaWorld.old_tasks[0], seed=0)
assert world.observe().image.std() > 10, "the rendered image is empty"
"""


def make_world(name: str) -> World:
    """Return the world called `name`.

    Raises:
        UserError: There is no such world, or its packages are not installed.
    """
    if name in RENDERED:
        try:
            from craft_ds.worlds.continual_world import ContinualWorld
            from craft_ds.worlds.metaworld import MetaWorld
        except ImportError as error:
            raise UserError(f"--world {name} cannot be imported ({error}): {gl_problem()}") from error
        return ContinualWorld() if name == "cw10" else MetaWorld()
    if name == "blocks":
        from craft_ds.worlds.blocks import Blocks

        return Blocks()
    raise UserError(f"--world {name} is unknown: choose one of {', '.join(WORLDS)}")


def teacher_directory(world: str) -> Path:
    """Return the policy directory of a world's shipped teacher.

    Raises:
        UserError: None is shipped for this world.
    """
    if world not in WITH_TEACHER:
        raise UserError(f"no teacher of {world} is shipped: make one with `craft-ds worlds pretrain`")
    return Path(__file__).parent / "assets" / f"{world}_teacher"


def gl_problem() -> str | None:
    """Return why Meta-World cannot render here and how to fix it, in one line, or None if it can.

    A frame is rendered in a separate process, because a broken GL library may kill its process.
    """
    try:
        result = subprocess.run(
            [sys.executable, "-c", _RENDER_PROBE], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        reason = "the renderer does not respond"
    else:
        if result.returncode == 0:
            return None
        lines = result.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the renderer exited with status {result.returncode}"
    if "No module named" in reason:
        return f"Meta-World is not installed ({reason}): pip install 'craft-ds[world]'"
    return (
        f"MuJoCo cannot render off-screen ({reason}): "
        "install software EGL, on Debian and Ubuntu by `apt-get install libegl1 libgl1-mesa-dri`"
    )


__all__ = ["WORLDS", "Observation", "World", "gl_problem", "make_world", "teacher_directory"]
