import pytest

from craft_ds.world import gl_problem


@pytest.fixture(scope="session")
def metaworld():
    """The class MetaWorld; test_gl.py asserts that a machine which skips here says why."""
    if problem := gl_problem():
        pytest.skip(problem)
    from craft_ds.world.metaworld import MetaWorld

    return MetaWorld
