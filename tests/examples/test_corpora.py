"""How the demo texts are cut into records and split; no package is fetched."""

import struct
import sys
import zlib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpora():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        import corpora

        yield corpora
    finally:
        sys.path.remove(folder)


def test_pack_keeps_order_and_every_piece_within_the_limit(corpora):
    pieces = [f"{number} " + "x" * (37 * number % 200) for number in range(60)]

    records = corpora.pack(pieces)

    assert "\n".join(record.text for record in records).split("\n") == pieces
    assert max(len(record.text) for record in records) <= corpora.RECORD_CHARS
    assert not any(record.complete for record in records)


def test_a_long_definition_ends_after_its_last_whole_sentence(corpora):
    sentence = "It goes on about something at a certain length, as such entries do. "

    record = corpora.definition("Define THING:", "n. " + sentence * 20)

    assert record.complete
    assert record.text.endswith("as such entries do.")
    assert 150 < len(record.text) <= corpora.RECORD_CHARS


def test_a_definition_without_a_sentence_end_is_cut_at_a_word_and_goes_on(corpora):
    record = corpora.definition("Define THING:", "n. " + "word " * 200)

    assert not record.complete
    assert record.text.endswith("word")


def test_groups_are_held_out_whole_and_slurs_are_left_out(corpora, tmp_path, monkeypatch):
    def read(root):
        for number in range(400):
            yield f"chapter {number}", [corpora.Record(f"{number}: {line}", True) for line in ("a", "b", "a mulatto")]

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "VERSION").write_text("1.0\n")
    monkeypatch.setitem(corpora.SOURCES, "text", corpora.Source("package", "a text", "public domain", read))

    corpus = corpora.load_corpus("text", tmp_path)

    def chapters(records):
        return {record.text.split(":")[0] for record in records}

    assert corpus.version == "1.0"
    assert len(corpus.train) + len(corpus.heldout) == 800
    assert not chapters(corpus.train) & chapters(corpus.heldout)
    assert 5 < len(chapters(corpus.heldout)) < 50
    assert corpora.load_corpus("text", tmp_path) == corpus


def test_jargon_entries_keep_their_references_and_lose_their_layout(corpora, tmp_path, monkeypatch):
    text = (
        "header\n(TM)\n //\n\n    [Usenet] A mark that is put behind phrases worth recording.\n\n"
        "blurgle\n /bler'gl/, n.\n\n    [UK] Spoken {metasyntactic\n    variable}, to indicate some text.\n\n\n"
        "            a listing\n"
    )
    monkeypatch.setattr(corpora, "read_dict", lambda root, name: text)

    entries = dict(corpora.read_jargon(tmp_path))

    assert entries["blurgle"][0].text == (
        "Jargon entry for blurgle: /bler'gl/, n. [UK] Spoken {metasyntactic variable}, to indicate some text."
    )


def test_devil_entries_lose_their_verses(corpora, tmp_path, monkeypatch):
    paragraphs = (
        "PREFACE",
        "ADORE, v.t.  To venerate\nexpectantly.",
        "    A verse\n    goes here",
        "ADVICE, n.  The coin.",
    )
    text = "\n\n".join(paragraphs)
    monkeypatch.setattr(corpora, "read_dict", lambda root, name: text)

    assert [records[0].text for _, records in corpora.read_devil(tmp_path)] == [
        "Define ADORE: v.t. To venerate expectantly.",
        "Define ADVICE: n. The coin.",
    ]


def test_novels_are_read_out_of_r_blocks(corpora, tmp_path):
    lines = [
        "EMMA",
        "",
        "CHAPTER I",
        "",
        "Emma Woodhouse, handsome,",
        "clever, and rich--",
        "",
        "CHAPTER II",
        "",
        "Mr. Weston.",
    ]
    vector = b"X\n" + struct.pack(">III", 2, 0, 0) + struct.pack(">II", 16, len(lines))
    for line in lines:
        vector += struct.pack(">II", 0x00040009, len(line)) + line.encode()
    block = struct.pack(">I", len(vector)) + zlib.compress(vector)
    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    (folder / "Rdata.rdb").write_bytes(block * 2)

    chapters = {key: [record.text for record in records] for key, records in corpora.read_austen(tmp_path)}

    assert chapters == {
        f"{novel}/{number}": [text]
        for novel in (1, 2)
        for number, text in ((0, "Emma Woodhouse, handsome, clever, and rich—"), (1, "Mr. Weston."))
    }
