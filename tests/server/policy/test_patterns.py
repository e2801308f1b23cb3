"""Patterns over names, and which of several decides."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.policy.patterns import PatternTable, matches

NAMES = st.text(alphabet="ab-.", max_size=8)
PATTERNS = st.text(alphabet="ab-.*", max_size=8)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(pattern=PATTERNS, name=NAMES)
def test_star_stands_for_any_characters_and_the_rest_for_itself(pattern, name):
    expression = "".join(".*" if character == "*" else re.escape(character) for character in pattern)
    assert matches(pattern, name) == bool(re.fullmatch(expression, name))


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("prod", "prod"),
        ("support-de-1", "support-de-*"),
        ("support-fr", "support-*"),
        ("support-*", "support-*"),
        ("ab", "*b"),
        ("abc", "a*"),
        ("", "*"),
        ("x", "*"),
    ],
)
def test_most_characters_decide_then_fewest_stars_then_the_first(name, decides):
    patterns = ["*", "**", "support-*", "support-de-*", "prod", "p*rod", "prod*", "*b", "a*"]
    assert PatternTable({pattern: pattern for pattern in patterns}).find(name) == decides


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(patterns=st.lists(PATTERNS, unique=True, max_size=8), name=NAMES)
def test_decision_is_the_documented_one(patterns, name):
    def rank(pattern: str) -> tuple[int, int, int]:
        return len(pattern.replace("*", "")), -pattern.count("*"), -patterns.index(pattern)

    fitting = [pattern for pattern in patterns if matches(pattern, name)]
    expected = max(fitting, key=rank) if fitting else None
    assert PatternTable({pattern: pattern for pattern in patterns}).find(name) == expected


@pytest.mark.timeout(60)  # with backtracking it would take for ever
def test_no_name_makes_a_pattern_slow():
    assert not matches("a*" * 30 + "b", "a" * 200_000)
    assert not matches("*".join(string.ascii_letters), "a" * 200_000)
