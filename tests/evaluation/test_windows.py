"""Cutting texts: every token but the first is scored once, behind enough context."""

import random

import pytest
from lorikeet.server.evaluation.errors import EvaluationError, TextTooShortError
from lorikeet.server.evaluation.texts import read_texts
from lorikeet.server.evaluation.windows import Window, choose_sizes, cut, cut_all


def test_the_example_of_the_module():
    found = [(window.start, window.stop - 1, list(range(window.first, window.stop))) for window in cut(10, 4, 2)]
    assert found == [(0, 3, [1, 2, 3]), (2, 5, [4, 5]), (4, 7, [6, 7]), (6, 9, [8, 9])]


def test_every_token_is_scored_once_behind_enough_context():
    rng = random.Random(1)
    for _ in range(300):
        context = rng.randint(2, 40)
        stride, count = rng.randint(1, context // 2), rng.randint(0, 200)
        windows = cut(count, context, stride)
        assert [token for window in windows for token in range(window.first, window.stop)] == list(range(1, count))
        for number, window in enumerate(windows):
            assert 0 <= window.start < window.first < window.stop <= count
            assert window.stop - window.start <= context
            if number:
                assert window.stop - window.start == context
                assert window.first - window.start >= context - stride >= stride


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (0, 0), (8, 5), (8, 0), (8, -1)])
def test_sizes_that_are_not_allowed(context: int, stride: int):
    with pytest.raises(EvaluationError, match=r"allowed: "):
        cut(10, context, stride)


def test_default_sizes_fit_the_model():
    assert choose_sizes(None, None, 512) == (512, 256)
    assert choose_sizes(None, None, 100_000) == (1024, 512)
    assert choose_sizes(64, 8, 512) == (64, 8)
    with pytest.raises(EvaluationError, match="at most 512"):
        choose_sizes(513, None, 512)


def test_a_text_that_is_too_short_is_refused():
    assert cut_all([[1], [1, 2, 3], []], 8, 4) == [(1, Window(0, 3, 1))]
    with pytest.raises(TextTooShortError, match="has 1 tokens, of which 0 can be scored"):
        cut_all([[1]], 8, 4)
    with pytest.raises(TextTooShortError, match="at least 9 are needed"):
        cut_all([[1] * 5, [1] * 5], 8, 4, least=9)


def test_texts_of_a_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One.\nStill one.\n\n \n\nTwo, été.\n", encoding="utf-8")
    assert read_texts(file) == ["One.\nStill one.\n\n \n\nTwo, été.\n"]
    assert read_texts(file, by_paragraph=True) == ["One.\nStill one.", "Two, été."]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_texts(file)
    file.write_text(" \n\n")
    with pytest.raises(TextTooShortError, match="no text"):
        read_texts(file)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_texts(tmp_path / "gone.txt")
