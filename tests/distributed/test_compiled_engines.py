"""Compiled layers on 2 and 3 ranks have the gradients of one process that compiles nothing."""

import json
from pathlib import Path

import pytest
from compiled_ranks import CASES
from scenarios_lora import KINDS

from craft_ds.testing.adapters import make_test_adapters
from craft_ds.testing.policies import make_test_policy_dir

TOLERANCE = {"fsdp-bf16": 5e-2}
BY_DEFAULT: dict[int, list[str]] = {2: [], 3: ["fsdp", "fsdp-recompute"]}
# Layers are traced and differentiated as with TorchInductor, whose kernels take minutes to build on ranks and
# are tested in one process (`tests/engines/test_compiled_layers.py`).
BACKEND = {False: "aot_eager", True: "inductor"}
"""Backend without and with `--all`."""


@pytest.fixture(scope="module")
def results(request, inductor, fork_server, tmp_path_factory):
    """Results of all cases by number of ranks; each number is launched once."""
    root = tmp_path_factory.mktemp("compiled")
    policy = make_test_policy_dir(root / "policy")
    for kind in ("plain", "dora"):
        make_test_adapters(policy, root / "adapters" / kind, KINDS[kind])
    launched: dict[int, Path] = {}

    def launch(world_size: int) -> Path:
        if world_size not in launched:
            launched[world_size] = root / str(world_size)
            launched[world_size].mkdir()
            every = request.config.getoption("--all")
            names = list(CASES) if every else BY_DEFAULT[world_size]
            program = Path(__file__).with_name("compiled_ranks.py")
            arguments = [launched[world_size], policy, root / "adapters", BACKEND[every], *names]
            ended = fork_server.run(arguments, world_size, program=program, timeout=420)
            (launched[world_size] / "output").write_text("\n".join(ended.outputs))
        return launched[world_size]

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(world_size, name, marks=[pytest.mark.sample(0)] * (name not in names))
        for world_size, names in BY_DEFAULT.items()
        for name in CASES
    ],
)
def test_gradients_are_those_of_one_eager_process(results, world_size, name):
    directory = results(world_size)
    errors = [path.read_text() for path in sorted(directory.glob(f"{name}.?.error"))]
    assert not errors, "\n".join(errors)
    found = [json.loads(path.read_text()) for path in sorted(directory.glob(f"{name}.?.json"))]
    assert len(found) == world_size, (directory / "output").read_text()[-4000:]
    for rank in found:
        assert rank["graphs"] == 3, rank  # layers of decoder, its last one, and encoder; for all lengths
        assert rank["loss"] <= TOLERANCE.get(name, 1e-5)
        assert rank["gradient"] <= TOLERANCE.get(name, 1e-5)
        assert not [key for key in rank["names"] if "_orig_mod" in key]
