"""Every situation of `situations.py` gets its verdict: right, refused by one line, or warned. None is silent."""

import pytest
from situations import SITUATIONS, Lab

from craft_ds.testing.perfect_tokens import decode_perfect_tokens

pytestmark = pytest.mark.slow


def test_there_are_enough_situations_of_each_verdict():
    names = [situation.name for situation in SITUATIONS]
    assert len(set(names)) == len(names) >= 60
    assert {situation.verdict for situation in SITUATIONS} == {"right", "refused", "warned"}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_each_situation_gets_its_verdict(train, inputs, tmp_path, situation):
    lab = Lab(inputs, tmp_path)
    flags = situation.flags(lab)
    if "--policy.path=" in flags:
        flags = [*(flag for flag in inputs.flags(tmp_path / "run") if "policy.path" not in flag), *flags[1:]]
        ended = train(None, *flags, "--steps=1")
    else:
        ended = train(tmp_path / "run", "--steps=1", *flags)
    printed = ended.output + ended.errors
    for words in situation.says:
        assert words in printed, printed
    warnings = [line for line in printed.splitlines() if line.startswith("warning")]
    if situation.verdict == "refused":
        assert ended.status == 2, printed
        assert ended.errors.startswith("error: "), printed
        assert ended.errors.count("\n") == 1, printed
        assert not (tmp_path / "run" / "final").exists()
        return
    assert ended.status == 0, printed
    assert (situation.verdict == "warned") == bool(warnings), printed
    if situation.verdict == "right":
        found, recorded = decode_perfect_tokens(tmp_path / "run" / "final", lab.data_root)
        assert found.shape == recorded.shape
        spread = recorded.amax() - recorded.amin()
        # FAST rounds coefficients: an eighth of the statistics' half range on average, here a sixth of the data's.
        assert (found - recorded).abs().mean() < 0.15 * spread
