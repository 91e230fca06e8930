import copy
import fcntl
import os
import shutil
import threading
import time

import pytest
import torch
from torch import nn

from craft_ds.engines.deepspeed_cpu_adam import LONGEST_BUILD_S, cpu_adam, wait_for_other_builders
from craft_ds.errors import UserError


@pytest.mark.usefixtures("compiled_cpu_adam")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_it_steps_as_torch_does(kind):
    torch.manual_seed(0)
    model = nn.Linear(37, 11)
    other = copy.deepcopy(model)

    def groups(linear):
        return [{"params": [linear.weight], "lr": 3e-3}, {"params": [linear.bias], "weight_decay": 0.0}]

    ours = cpu_adam(kind(groups(model), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3))
    torchs = kind(groups(other), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
    for _ in range(5):
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        ours.step()
        torchs.step()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(parameter, same, rtol=1e-5, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            found, expected = ours.state[parameter][key], torchs.state[same][key]
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), "SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize"),
    ],
)
def test_what_it_cannot_do_is_said(make, name):
    with pytest.raises(UserError, match=f"{name}.*zero_force_ds_cpu_optimizer"):
        cpu_adam(make([nn.Parameter(torch.zeros(2))]))


def test_a_machine_that_cannot_compile_it_is_told_what_to_do(monkeypatch):
    from craft_ds.engines.deepspeed_cpu_adam import CPUAdamBuilder

    def load(builder):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    with pytest.raises(UserError, match=r"g\+\+ and ninja \(no compiler at all\).*zero_force_ds_cpu"):
        cpu_adam(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """Start to wait for whoever builds in `tmp_path`."""
    monkeypatch.setattr("craft_ds.engines.deepspeed_cpu_adam.QUIET_S", 0)

    def start():
        thread = threading.Thread(target=wait_for_other_builders, args=(tmp_path,), daemon=True)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        return thread

    return start


def leave_behind(mark):
    mark.touch()
    killed = time.time() - LONGEST_BUILD_S - 1
    os.utime(mark, (killed, killed))


def test_the_marker_of_a_killed_build_is_removed(compiler, compiled_cpu_adam, tmp_path, capsys):
    built = tmp_path / "cpu_adam"
    shutil.copytree(compiled_cpu_adam.parent, built, ignore=shutil.ignore_patterns("lock"))
    leave_behind(built / "lock")
    assert compiler(TORCH_EXTENSIONS_DIR=str(tmp_path)).parent == built
    assert f"{built / 'lock'}: removed, its process was killed 10 min ago" in capsys.readouterr().err
    assert not (built / "lock").exists()


def test_a_running_build_is_awaited(waiting, tmp_path, caplog):
    mark = tmp_path / "lock"
    mark.touch()
    thread = waiting()
    assert mark.exists()
    mark.unlink()
    thread.join(30)
    assert not thread.is_alive()
    assert caplog.text.count(f"{mark}: another process compiles DeepSpeed's Adam") == 1


def test_the_marker_of_a_new_build_is_not_removed(waiting, tmp_path):
    mark = tmp_path / "lock"
    leave_behind(mark)
    with (tmp_path / "craft_ds.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        thread = waiting()
        mark.unlink()
        mark.touch()
    thread.join(0.5)
    assert mark.exists()
    mark.unlink()
    thread.join(30)
    assert not thread.is_alive()
