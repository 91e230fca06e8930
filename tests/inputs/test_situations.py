"""Every situation of `situations.py` is right, refused by one line, or warned of: none is silent."""

import pytest
from situations import SITUATIONS, Lab

from craft_ds.testing.perfect_tokens import decode_perfect_tokens

pytestmark = pytest.mark.slow


def test_there_are_enough_situations_of_each_verdict():
    names = [situation.name for situation in SITUATIONS]
    assert len(set(names)) == len(names) >= 60
    assert {situation.verdict for situation in SITUATIONS} == {"right", "refused", "warned"}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_each_situation_gets_its_verdict(train, fitting, tmp_path, situation):
    lab = Lab(fitting, tmp_path)
    flags = fitting.flags(tmp_path / "run")
    given = situation.flags(lab)
    if any(flag.startswith("--policy.pretrained_path=") for flag in given):
        flags = [flag for flag in flags if not flag.startswith("--policy.path=")]
    ended = train(None, *flags, "--steps=1", *given)
    printed = ended.output + ended.errors
    for words in situation.says:
        assert words in printed, printed
    if situation.verdict == "refused":
        assert ended.status == 2, printed
        assert ended.errors.startswith("error: "), printed
        assert ended.errors.count("\n") == 1, printed
        assert not (tmp_path / "run" / "final").exists()
        return
    assert ended.status == 0, printed
    warnings = [line for line in printed.splitlines() if line.startswith("warning")]
    assert (situation.verdict == "warned") == bool(warnings), printed
    if situation.verdict == "right":
        found, recorded = decode_perfect_tokens(tmp_path / "run" / "final", lab.data_root)
        assert found.shape == recorded.shape
        spread = recorded.amax() - recorded.amin()
        # FAST rounds coefficients scaled by 4: errors of a few hundredths of the statistics' range.
        assert (found - recorded).abs().mean() < 0.1 * spread
