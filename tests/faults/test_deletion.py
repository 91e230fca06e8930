"""Deletion of older checkpoints (`--save_total_limit`) keeps everything a run still needs."""

import pytest


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_may_delete_the_checkpoint_it_resumed_from(train, tmp_path, background):
    """Each checkpoint copies the policy's processors and tokenizers from the one the run resumed from."""
    assert train(tmp_path / "unbroken", "--save_freq=1").status == 0
    run, flags = tmp_path / "run", ["--save_freq=1", "--save_total_limit=1", "--resume=auto"]
    assert train(run, *flags, "--steps=2").status == 0
    (run / "final").rename(tmp_path / "final of 2 steps")
    ended = train(run, *flags, "--steps=4", f"--checkpoint.background={background}")
    assert ended.status == 0, ended.errors
    assert "error:" not in ended.output
    assert sorted(path.name for path in run.iterdir()) == ["final", "last", "metrics.jsonl", "step_000003"]
    for name in ("final", "step_000003"):
        assert {path.name for path in (run / name).iterdir()} == {
            path.name for path in (tmp_path / "unbroken" / name).iterdir()
        }
