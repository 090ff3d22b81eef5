"""Trials of a calibration: needles in prose, and their answers."""

from __future__ import annotations

import numpy as np
import pytest
from support.llamas import ONE_THREAD
from support.needles import NEEDLES, SMALL

from kvcompose_gguf import ConfigError
from kvcompose_gguf.learning import trials
from kvcompose_gguf.learning.trials import CalibrateOptions
from kvcompose_gguf.tasks.texts import load_texts


@pytest.mark.parametrize("number", range(4))
def test_a_prompt_has_its_needle_where_it_should_be(make_llama, spelled, number):
    llama = make_llama(**ONE_THREAD)
    prompt, place = trials.needle_prompt(llama, SMALL, number)
    text = llama.detokenize(prompt[1:]).decode().replace("▁", " ")
    beginning, end, question = NEEDLES[0]
    assert llama.detokenize(prompt[place.start : place.stop]).decode() == end
    assert text.count(end) == 1
    assert text.endswith(f"Question: {question} Answer:")
    n_tokens = (400, 400, 700, 700)[number]
    assert n_tokens - 300 < len(prompt) <= n_tokens  # a space is three tokens
    if number % 2 == 0:
        assert text.startswith(beginning)
    else:
        assert f"{end}.\n\nBased on" in text


def test_prose_is_the_needles_own_and_not_that_of_an_evaluation(make_llama, spelled):
    llama = make_llama(**ONE_THREAD)
    options = CalibrateOptions(n_needles=2, n_lengths=1, n_depths=1, shortest=1200)
    found = []
    sentences = load_texts("generated").sentences
    for number in range(2):
        prompt, _ = trials.needle_prompt(llama, options, number)
        text = llama.detokenize(prompt).decode().replace("▁", " ")
        found.append({i for i, sentence in enumerate(sentences) if sentence in text})
        assert found[number]
    assert not found[0] & found[1]
    assert min(found[0] | found[1]) >= len(sentences) - 2 * 150


def test_recall_counts_words():
    assert trials.recall("a storm broke its lamp", " A STORM, it broke: its lamp!") == 1
    assert trials.recall("a storm broke its lamp", "storm storm storm") == 0.2
    assert trials.recall("by and by", "by") == pytest.approx(1 / 3)
    assert trials.recall("one", "") == 0


def test_a_wrong_answer_does_not_count_and_other_tokens_of_a_right_one_do_not(make_llama, forced, monkeypatch):
    llama = make_llama(**ONE_THREAD)
    seen = []
    attention_to = trials.attention_to
    monkeypatch.setattr(trials, "attention_to", lambda *args: seen.append(args) or attention_to(*args))
    forced[:] = [f" X: {NEEDLES[0][1].upper()}.".encode()]  # in any case; X is not in it
    result = trials.needle_trial(llama, SMALL, 1)
    _, prompt, choices, belongs, place = seen[0]
    assert (prompt, place) == trials.needle_prompt(llama, SMALL, 1)
    text = bytes(llama.piece(token)[0] for token in choices).decode()
    assert text == f"▁X:▁{NEEDLES[0][1].upper()}."
    assert belongs == [byte in NEEDLES[0][1].upper().encode() for byte in text.encode()]
    assert np.shape(result["heads"]) == (3, 4)
    forced[:] = [b" a custard tart, I suppose"]
    assert trials.needle_trial(llama, SMALL, 1)["heads"] is None
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_needles": 6}, "n_needles=6; allowed: 1 to 5"), ({"n_lengths": 0}, "n_lengths"),
        ({"shortest": 100}, "shortest"), ({"shortest": 500, "longest": 400}, "shortest"), ({"n_depths": 0}, "n_depths"),
        ({"n_errors": 0}, "n_errors"), ({"n_random": -1}, "n_random"), ({"n_random": 31}, "n_random=31"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        CalibrateOptions(**options)
