"""The card's hash is found where it is, and no card, however malformed, does more than make a warning."""

import hashlib
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lorikeet.adapters.card import CARD_FILE, HASH_KEY, MAX_CARD_BYTES, AdapterCard, parse_card, read_card

HASH = hashlib.sha256(b"a base").hexdigest()


def card(*lines: str) -> bytes:
    return "\n".join(["---", *lines, "---", "", "# An adapter", f"{HASH_KEY}: {'0' * 64}"]).encode()


@pytest.mark.parametrize(
    "line",
    [
        f"{HASH_KEY}: {HASH}", f"{HASH_KEY}: '{HASH}'", f'{HASH_KEY}: "{HASH}"  # of the base', f'"{HASH_KEY}": {HASH}',
        f"{HASH_KEY}: {HASH.upper()}", f"{HASH_KEY}:   {HASH}   ",
    ],
)  # fmt: skip
def test_hash_is_read_as_people_write_it(line):
    assert parse_card(card("base_model: a/b", line, "tags: [lora]")) == AdapterCard(HASH)


def test_yaml_agrees_with_what_is_read():
    data = card("base_model: a/b", f"{HASH_KEY}: {HASH}", "tags: [lora]")
    assert yaml.safe_load(data.split(b"---")[1])[HASH_KEY] == HASH


@pytest.mark.parametrize("digits", ["1" * 64, "0" * 64, "1" * 30 + "e" + "5" * 33])
def test_hash_that_looks_like_a_number_is_a_hash(digits):
    assert parse_card(card(f"{HASH_KEY}: {digits}")).base_model_sha256 == digits


def test_line_ends_of_windows_and_a_byte_order_mark_do_no_harm():
    data = b"\xef\xbb\xbf" + card(f"{HASH_KEY}: {HASH}").replace(b"\n", b"\r\n")
    assert parse_card(data) == AdapterCard(HASH)


@pytest.mark.parametrize(
    "data",
    [b"", b"# An adapter\n", b"\n---\nx: 1\n---\n", card("base_model: a/b"), card(f"  {HASH_KEY}: {HASH}"),
     card("text: |", f"  {HASH_KEY}: {HASH}"), card(f"{HASH_KEY}:"), card(f"x{HASH_KEY}: {HASH}"),
     card(f"# {HASH_KEY}: {HASH}")],
)  # fmt: skip
def test_card_without_a_hash_says_nothing(data):
    assert parse_card(data) == AdapterCard()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (card(f"{HASH_KEY}: {HASH[:-1]}"), "64 hex digits"),
        (card(f"{HASH_KEY}: {HASH}0"), "64 hex digits"),
        (card(f"{HASH_KEY}: 'x{HASH[1:]}'"), "64 hex digits"),
        (card(f"{HASH_KEY}: '{HASH}\""), "64 hex digits"),
        (card(f"{HASH_KEY}: [{HASH}]"), "64 hex digits"),
        (card(f"{HASH_KEY}: *base"), "64 hex digits"),
        (card(f"{HASH_KEY}: {HASH}", f"{HASH_KEY}: {HASH}"), "more than once"),
        (b"---\n" + b"x: 1\n", "does not end"),
        (b"---\nx: \xff\n---\n", "UTF-8"),
        (b"---\nx: \x00\xfe\n---\n", "UTF-8"),
        (b"---\n" + b"a" * 10 * MAX_CARD_BYTES, "does not end"),
        (b"---\n" + b"- x\n" * MAX_CARD_BYTES + b"---\n", "does not end"),
    ],
)
def test_malformed_card_is_a_warning(data, words):
    found = parse_card(data)
    assert found.base_model_sha256 is None
    assert found.warning is not None and words in found.warning and len(found.warning) < 400


def test_yaml_bomb_costs_nothing():
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    merges = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    deep = "x: " + "[" * 20_000
    data = card("a0: &a0 [lol]", *levels, "m0: &m0 {x: 1}", *merges, deep, f"{HASH_KEY}: {HASH}")
    assert len(data) < MAX_CARD_BYTES
    assert parse_card(data) == AdapterCard(HASH)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_card_or_none(tail):
    for data in (tail, b"---\n" + tail, b"---\n" + HASH_KEY.encode() + b": " + tail + b"\n---\n"):
        found = parse_card(data)
        assert found.base_model_sha256 is None or len(found.base_model_sha256) == 64


def test_card_is_read_from_the_folder(tmp_path):
    assert read_card(tmp_path) == AdapterCard()
    (tmp_path / CARD_FILE).write_bytes(card(f"{HASH_KEY}: {HASH}") + b"text\n" * 10**6)
    found = read_card(tmp_path, [tmp_path])
    assert found == AdapterCard(HASH)
    assert found.text.startswith("---\n") and len(found.text) == MAX_CARD_BYTES


def test_huge_card_is_read_no_further_than_the_limit(tmp_path):
    with (tmp_path / CARD_FILE).open("wb") as file:
        file.write(b"---\n")
        file.truncate(2**40)  # sparse: reading it whole would take a terabyte
    assert "does not end" in (read_card(tmp_path).warning or "")


def test_card_that_leads_out_of_the_roots_is_a_warning(tmp_path):
    (tmp_path / "secret").write_bytes(card(f"{HASH_KEY}: {HASH}"))
    folder = tmp_path / "roots" / "one"
    folder.mkdir(parents=True)
    (folder / CARD_FILE).symlink_to(tmp_path / "secret")
    found = read_card(folder, [tmp_path / "roots"])
    assert found.base_model_sha256 is None and "leads out" in (found.warning or "")
    assert str(tmp_path) not in (found.warning or "")


def test_card_that_is_no_file_is_none(tmp_path):
    os.mkfifo(tmp_path / CARD_FILE)
    assert read_card(tmp_path) == AdapterCard()
    (tmp_path / CARD_FILE).unlink()
    (tmp_path / CARD_FILE).mkdir()
    assert read_card(tmp_path) == AdapterCard()
