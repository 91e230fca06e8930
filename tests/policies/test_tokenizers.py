"""The locally trained text and action tokenizers."""

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer

from craft_ds.policies.tiny_pi0_fast.fast_tokenizer import FIRST_SYMBOL, FastActionProcessor
from craft_ds.policies.tiny_pi0_fast.tokenizers import build_text_tokenizer, fit_action_tokenizer
from craft_ds.testing.policies import TASKS, smooth_chunks


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    build_text_tokenizer(TASKS, path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def action(tmp_path_factory):
    path = tmp_path_factory.mktemp("action")
    fit_action_tokenizer(smooth_chunks(300, seed=0), path)
    return AutoProcessor.from_pretrained(path)


def test_text_tokenizer_has_the_pieces_that_pi0_fast_needs(text):
    pieces = text.convert_ids_to_tokens(text.encode("Action: 12|", add_special_tokens=False))
    assert pieces == ["Action", ":", "▁", "1", "2", "|"]
    assert text.bos_token_id is not None


def test_prompts_start_with_bos_and_digits_are_single_tokens(text):
    pieces = text.convert_ids_to_tokens(text.encode("Task: Press a button from the top, State: 128 -1 7;\n"))
    assert pieces[0] == "<bos>"
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


@pytest.mark.parametrize("prompt", ["Task: Press a button, State: 3 255;\n", "Überraschung — 机器人\t!"])
def test_text_survives_the_round_trip(text, prompt):
    assert text.decode(text.encode(prompt), skip_special_tokens=True) == prompt


def test_the_vocabulary_ends_with_the_action_tokens(text):
    # pi0_fast: action token t is text token vocab_size - 1 - fast_skip_tokens - t.
    assert len(text) == text.vocab_size < 900
    names = text.convert_ids_to_tokens([text.vocab_size - 1 - t for t in range(256)])
    assert names == [f"<action{t}>" for t in range(256)]
    assert not any(
        name.startswith("<action") for name in text.convert_ids_to_tokens(range(text.vocab_size - 256))
    )


def test_action_is_one_piece_among_more_frequent_pieces(tmp_path):
    words = ["".join(chr(97 + (7 * i + 3 * k * k) % 26) for k in range(6)) for i in range(40)]
    tokenizer = build_text_tokenizer([" ".join(words * 3)] * 20, tmp_path)
    assert tokenizer.tokenize("Action: ")[0] == "Action"


def test_numbers_may_be_single_tokens(tmp_path):
    build_text_tokenizer(TASKS, tmp_path, numbers=256)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = "Task: Press a button, State: 0 7 42 255 256 -1;\nAction: "
    pieces = tokenizer.tokenize(prompt)
    first = pieces.index("▁0")
    assert pieces[first : first + 4] == ["▁0", "▁7", "▁42", "▁255"]
    assert pieces[first + 4 : first + 9] == ["▁25", "6", "▁", "-", "1"]
    assert "Action" in pieces
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=True) == prompt
    assert tokenizer.convert_ids_to_tokens(tokenizer.vocab_size - 1) == "<action0>"


def test_building_twice_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        build_text_tokenizer(TASKS, tmp_path / name / "text")
        fit_action_tokenizer(smooth_chunks(50, seed=1), tmp_path / name / "action")
    for file in ("text/tokenizer.json", "action/tokenizer.json", "action/processor_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_action_round_trip_errs_by_no_more_than_rounding(action):
    chunks = smooth_chunks(100, seed=7) * 0.8
    tokens = action(chunks)
    decoded = action.decode(tokens, time_horizon=8, action_dim=4)
    # The transform is orthonormal and each of 8 coefficients is off by at most 0.5 / scale.
    assert np.sqrt(((decoded - chunks) ** 2).sum(axis=1)).max() <= np.sqrt(8) * 0.5 / action.scale + 1e-6
    assert np.abs(decoded - chunks).mean() < 0.08
    assert np.mean([len(ids) for ids in tokens]) < 16  # of 32 coefficients


def test_coefficients_out_of_range_saturate(action):
    far = np.full((1, 8, 4), 50.0)
    decoded = action.decode(action(far), time_horizon=8, action_dim=4)
    assert np.allclose(decoded, action.max_token / action.scale / np.sqrt(8))
    low = action.min_token + FIRST_SYMBOL
    assert np.allclose(
        action.decode(action(-far), time_horizon=8, action_dim=4), low / action.scale / np.sqrt(8)
    )


def test_action_ids_stay_inside_the_vocabulary(action):
    noise = np.random.default_rng(0).uniform(-5, 5, size=(200, 8, 4))
    ids = [i for chunk in action(noise) for i in chunk]
    assert min(ids) >= 0
    assert max(ids) < action.vocab_size == 256


def test_a_chunk_of_the_wrong_length_is_refused(action):
    with pytest.raises(ValueError, match="32 coefficients"):
        action.decode(action(np.zeros((8, 4))), time_horizon=7, action_dim=4)


def test_too_fine_a_scale_is_refused():
    with pytest.raises(ValueError, match="vocab_size 16"):
        FastActionProcessor.fit(smooth_chunks(20, seed=0), scale=100.0, vocab_size=16)
