"""`name`, `alias` or `id@digest-prefix`: what is understood, and how the rest is refused."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lorikeet.adapters.errors import AdapterDigestError, AdapterIdError, Code, ServingError
from lorikeet.adapters.reference import MIN_PREFIX, Reference, parse_reference

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
PREFIXES = st.text("0123456789abcdefABCDEF", min_size=MIN_PREFIX, max_size=64)


@given(name=IDS)
def test_name_alone_names_no_version(name):
    assert parse_reference(name) == Reference(name, "")


@given(name=IDS, prefix=PREFIXES)
def test_name_with_a_prefix_is_both_and_the_prefix_is_lower_case(name, prefix):
    assert parse_reference(f"{name}@{prefix}") == Reference(name, prefix.lower())


MALFORMED_IDS = ["", " a", "a b", "../a", "a/b", "-a", ".a", "é", "a\n", "a\0", "x" * 129, "x" * 10**6]
MALFORMED_PREFIXES = ["", "a", "abc", "0" * 65, "f" * 10**6, "abcg", "0xabcd", " abcd", "abcd\n", "abc\0", "@abcd"]
DIGITS_ELSEWHERE = ["\u0430\u0431\u0432\u0433", "\uff11\uff12\uff13\uff14", "\u0661\u0662\u0663\u0664"]


@pytest.mark.parametrize("name", MALFORMED_IDS)
@pytest.mark.parametrize("suffix", ["", "@abcd", "@"])
def test_malformed_names_are_refused(name, suffix):
    with pytest.raises(AdapterIdError) as error:
        parse_reference(name + suffix)
    assert error.value.code is Code.INVALID_ARGUMENT and len(error.value.message) < 1000


@pytest.mark.parametrize("prefix", MALFORMED_PREFIXES + DIGITS_ELSEWHERE)
def test_malformed_prefixes_are_refused(prefix):
    with pytest.raises(AdapterDigestError, match="4 to 64 hex digits") as error:
        parse_reference(f"a@{prefix}")
    assert error.value.code is Code.INVALID_ARGUMENT and len(error.value.message) < 1000


@given(text=st.text(string.printable + "é\0@@@@", max_size=200))
@example("@")
@example("a@")
@example("a@@abcd")
def test_any_text_is_a_reference_or_refused(text):
    try:
        name, prefix = parse_reference(text)
    except ServingError as error:
        assert error.code is Code.INVALID_ARGUMENT
    else:
        assert text.lower() == (f"{name}@{prefix}" if prefix else name).lower()
