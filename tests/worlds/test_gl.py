import pytest

from craft_ds.errors import UserError
from craft_ds.worlds import gl_problem, make_world


def test_this_machine_renders_or_the_packages_are_named():
    problem = gl_problem()
    assert problem is None or ("libegl1" in problem and "libgl1-mesa-dri" in problem and "\n" not in problem)


def test_without_egl_the_packages_are_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    problem = gl_problem()
    assert problem is not None
    assert "libegl1" in problem
    assert "libgl1-mesa-dri" in problem
    assert "\n" not in problem


def test_without_metaworld_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "metaworld.py").write_text("raise ModuleNotFoundError(\"No module named 'metaworld'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem = gl_problem()
    assert problem is not None
    assert "craft-ds[world]" in problem


def test_an_unknown_world_is_a_user_error():
    with pytest.raises(UserError, match="--world moon"):
        make_world("moon")
