"""In a complete run the host waits for the device once per step, logging and averages included."""

from craft_ds.config.parser import parse_arguments
from craft_ds.data import policy_input
from craft_ds.testing.host_waits import HostWaits
from craft_ds.training import trainer

FLAGS = ["--steps=6", "--log_freq=2", "--num_workers=1", "--ema_decay=0.9", "--save_checkpoint=false"]


def waits_by_step(flags: list[str], monkeypatch) -> list[dict[str, int]]:
    """Run and return how often each package waited in each step."""
    waits, steps = HostWaits(), list[dict[str, int]]()
    seed_step = trainer.seed_step

    def begin(*args: int) -> None:
        steps.append(waits.take())
        seed_step(*args)

    monkeypatch.setattr(policy_input, "copy_to_device", waits.copy_to_device)
    monkeypatch.setattr(trainer, "seed_step", begin)
    monkeypatch.setattr("sys.argv", ["train_craft.py"])
    with trainer.open_run(parse_arguments(flags)) as run, waits:
        trainer.train(run)
    return [*steps[1:], waits.take()]


def test_a_run_waits_once_per_step(inputs, tmp_path, monkeypatch):
    flags = [*inputs.flags(tmp_path / "run"), *inputs.craft_flags(), *FLAGS]
    assert waits_by_step(flags, monkeypatch) == [{"craft_ds": 1}] * 6


def test_a_run_with_one_gradient_waits_once_per_step(inputs, tmp_path, monkeypatch):
    flags = [*inputs.flags(tmp_path / "run"), *inputs.craft_flags(), *FLAGS]
    flags += ["--craft.use_grad_projection=false", "--craft.constraint_split=heldout"]
    assert waits_by_step(flags, monkeypatch) == [{"craft_ds": 1}] * 6
