"""A golden file comes back as it was written, a bad one is refused at little cost, and differences are seen."""

import dataclasses
import json
import os
import secrets
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lorikeet.adapters.errors import AdapterInvalidError, ServingError
from lorikeet.adapters.golden import (
    FORMAT,
    GOLDEN_FILE,
    MAX_PROMPT_TOKENS,
    MAX_PROMPTS,
    Golden,
    parse_golden,
    read_golden,
    write_golden,
)
from lorikeet.adapters.golden_comparison import EXACT_TOLERANCE, TOP_TOKENS, compare, difference
from safetensors.torch import save

VOCAB = 199
DIGEST = secrets.token_hex(32)
METADATA = {"format": FORMAT, "adapter_sha256": DIGEST, "tolerance": "0.2", "made_by": "a test"}


def random_golden(num_prompts: int = 3, dtype: torch.dtype = torch.float32) -> Golden:
    prompts = [tuple(torch.randint(VOCAB, (int(torch.randint(1, 9, ())),)).tolist()) for _ in range(num_prompts)]
    logits = (torch.randn(num_prompts, VOCAB) * 4).to(dtype)
    return Golden(DIGEST, tuple(prompts), logits, 0.2, "a test", "org/base", secrets.token_hex(32))


def golden_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "token_ids": torch.tensor([5, 6, 7, 8], dtype=torch.int32),
        "lengths": torch.tensor([3, 1], dtype=torch.int32),
        "logits": torch.randn(2, VOCAB),
    } | changes


def raw_file(header: object, payload: bytes = b"") -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_file_comes_back_as_it_was_written(tmp_path, dtype):
    golden = random_golden(5, dtype)
    assert write_golden(tmp_path, golden) == tmp_path / GOLDEN_FILE
    read = read_golden(tmp_path, [tmp_path], digest=DIGEST, vocab_size=VOCAB)
    assert read is not None and torch.equal(read.logits, golden.logits) and read.logits.dtype is dtype
    assert (
        dataclasses.replace(read, logits=golden.logits) != golden
    )  # compared by identity: tensors have no truth value
    for field in ("digest", "prompts", "tolerance", "made_by", "base_model", "base_model_sha256"):
        assert getattr(read, field) == getattr(golden, field)
    assert [path.name for path in tmp_path.iterdir()] == [GOLDEN_FILE]


def test_folder_without_a_file_has_none(tmp_path):
    assert read_golden(tmp_path, digest=DIGEST) is None


def test_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write_golden(tmp_path, random_golden())
    before = (tmp_path / GOLDEN_FILE).read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="space"):
        write_golden(tmp_path, random_golden())
    assert (tmp_path / GOLDEN_FILE).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_file_of_another_version_is_refused_with_the_remedy(tmp_path):
    write_golden(tmp_path, random_golden())
    other = secrets.token_hex(32)
    with pytest.raises(AdapterInvalidError) as caught:
        read_golden(tmp_path, digest=other)
    for words in (DIGEST[:12], other[:12], "lorikeet adapters golden"):
        assert words in caught.value.message


def test_file_for_another_vocabulary_is_refused(tmp_path):
    write_golden(tmp_path, random_golden())
    with pytest.raises(AdapterInvalidError, match=rf"vocabulary of {VOCAB}; here it is 512.*org/base"):
        read_golden(tmp_path, digest=DIGEST, vocab_size=512)


BAD_TENSORS = {
    "no prompt": {"lengths": torch.zeros(0, dtype=torch.int32), "token_ids": torch.zeros(0, dtype=torch.int32)},
    "an empty prompt": {"lengths": torch.tensor([4, 0], dtype=torch.int32)},
    "a negative length": {"lengths": torch.tensor([5, -1], dtype=torch.int32)},
    "a prompt that is too long": {
        "lengths": torch.tensor([1, MAX_PROMPT_TOKENS + 1], dtype=torch.int32),
        "token_ids": torch.ones(MAX_PROMPT_TOKENS + 2, dtype=torch.int32),
    },
    "too many prompts": {
        "lengths": torch.ones(MAX_PROMPTS + 1, dtype=torch.int32),
        "token_ids": torch.ones(MAX_PROMPTS + 1, dtype=torch.int32),
        "logits": torch.zeros(MAX_PROMPTS + 1, VOCAB),
    },
    "lengths that add up to more": {"lengths": torch.tensor([3, 2], dtype=torch.int32)},
    "lengths that overflow": {"lengths": torch.tensor([2**31 - 1, 2**31 - 1], dtype=torch.int32)},
    "logits for other prompts": {"logits": torch.zeros(3, VOCAB)},
    "logits of one dimension": {"logits": torch.zeros(2 * VOCAB)},
    "no vocabulary": {"logits": torch.zeros(2, 0)},
    "NaN": {"logits": torch.full((2, VOCAB), torch.nan)},
    "infinity": {"logits": torch.eye(2, VOCAB) * torch.inf},
    "a token outside the vocabulary": {"token_ids": torch.tensor([5, 6, VOCAB, 8], dtype=torch.int32)},
    "a negative token": {"token_ids": torch.tensor([5, 6, -1, 8], dtype=torch.int32)},
    "64-bit token ids": {"token_ids": torch.tensor([5, 6, 7, 8])},
    "logits of doubles": {"logits": torch.zeros(2, VOCAB, dtype=torch.float64)},
    "another tensor": {"pickle": torch.zeros(1)},
}


@pytest.mark.parametrize("changes", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_file_with_impossible_content_is_refused(changes):
    assert parse_golden(save(golden_tensors(), METADATA)).prompts == ((5, 6, 7), (8,))
    with pytest.raises(AdapterInvalidError, match=r"^lorikeet\.golden\.safetensors "):
        parse_golden(save(golden_tensors(**changes), METADATA))


BAD_METADATA = {
    "no format": {"format": ""},
    "a later format": {"format": "lorikeet golden 2"},
    "no version": {"adapter_sha256": ""},
    "a version that is none": {"adapter_sha256": "../" * 20 + "etc."},
    "upper case": {"adapter_sha256": "A" * 64},
    "no tolerance": {"tolerance": ""},
    "a tolerance of zero": {"tolerance": "0"},
    "a tolerance of NaN": {"tolerance": "nan"},
    "an endless tolerance": {"tolerance": "inf"},
    "a tolerance that accepts anything": {"tolerance": "1e9"},
    "a long tolerance": {"tolerance": "0." + "1" * 10_000},
    "a long story": {"made_by": "x" * 10_000},
    "a wrong hash of the base": {"base_model_sha256": "12"},
}


@pytest.mark.parametrize("changes", BAD_METADATA.values(), ids=BAD_METADATA)
def test_file_with_impossible_metadata_is_refused(changes):
    with pytest.raises(AdapterInvalidError) as caught:
        parse_golden(save(golden_tensors(), METADATA | changes))
    assert len(caught.value.message) < 400


BAD_FILES = {
    "nothing": b"",
    "a header that is not there": struct.pack("<Q", 2**62),
    "no JSON": raw_file(b"{"),
    "a list": raw_file([]),
    "a number": raw_file(7),
    "no tensors": raw_file({"__metadata__": METADATA}),
    "2^80 elements": raw_file({"logits": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
    "2^40 elements": raw_file({"logits": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"1234"),
    "a negative size": raw_file({"logits": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
    "an unknown type": raw_file({"logits": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a pickle": b"\x80\x04\x95" + b"x" * 100,
    "a deep header": raw_file(b"[" * 50_000),
    "a long header": raw_file({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES)
def test_file_that_is_none_is_refused(data):
    with pytest.raises(AdapterInvalidError, match="not a safetensors file, or not a complete one"):
        parse_golden(data)


@given(cut=st.integers(0, 2400))
def test_truncated_file_is_refused(cut):
    data = save(golden_tensors(), METADATA)
    with pytest.raises(AdapterInvalidError):
        parse_golden(data[: min(cut, len(data) - 1)])


@given(position=st.integers(0, 500), value=st.integers(0, 255))
def test_damaged_header_is_read_or_refused(position, value):
    data = bytearray(save(golden_tensors(), METADATA))
    data[position] = value
    try:
        parse_golden(data)
    except ServingError as error:
        assert isinstance(error, AdapterInvalidError)


def test_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / GOLDEN_FILE).open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(AdapterInvalidError, match=f"has {2**40} bytes; at most"):
        read_golden(tmp_path, digest=DIGEST)


@pytest.mark.parametrize("kind", ["a link out of the roots", "a link to nothing", "a pipe", "a folder"])
def test_only_a_file_in_the_roots_is_read(tmp_path, kind):
    folder = tmp_path / "roots" / "one"
    folder.mkdir(parents=True)
    path = folder / GOLDEN_FILE
    match kind:
        case "a link out of the roots":
            path.symlink_to(write_golden(tmp_path, random_golden()))
        case "a link to nothing":
            path.symlink_to(tmp_path / "nowhere")
        case "a pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(AdapterInvalidError) as caught:
        read_golden(folder, [tmp_path / "roots"], digest=DIGEST)
    assert str(tmp_path) not in caught.value.message


def test_equal_logits_differ_by_nothing_whatever_they_share():
    golden = random_golden()
    comparison = compare(golden, golden.logits + torch.randn(3, 1) * 10, exact=True)
    assert comparison.ok and comparison.largest < 1e-5
    assert str(comparison).startswith("3 prompts, largest difference ") and str(comparison).endswith(" of 0.01")


def test_difference_is_that_of_log_probabilities_of_the_likeliest_tokens():
    golden = random_golden(1)
    order = golden.logits[0].argsort(descending=True)
    other = golden.logits.clone()
    other[0, order[-1]] -= 20.0  # unlikely anyhow: changes no other probability and is not looked at
    assert compare(golden, other, exact=True).ok
    shift = torch.zeros(VOCAB)
    shift[order[1]] = 0.5
    want = golden.logits[0].log_softmax(-1) - (golden.logits[0] + shift).log_softmax(-1)
    got = difference(golden.logits, golden.logits + shift)
    torch.testing.assert_close(got[0].item(), want[order[:TOP_TOKENS]].square().mean().sqrt().item(), rtol=1e-4, atol=0)


def test_worst_prompt_decides():
    golden = random_golden(4)
    logits = golden.logits.clone()
    logits[2] = logits[2].flip(0)
    comparison = compare(golden, logits, exact=False)
    assert not comparison.ok
    assert [value < 1e-5 for value in comparison.differences] == [True, True, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_differ_infinitely(value):
    golden = random_golden()
    logits = golden.logits.clone()
    logits[1, 7] = value
    comparison = compare(golden, logits, exact=False)
    assert comparison.largest == float("inf") and not comparison.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_arithmetic_of_16_bits_is_tolerated_where_the_server_has_no_other(dtype):
    golden = random_golden(dtype=dtype)
    rounded = golden.logits.float() + torch.randn(3, VOCAB) * 0.06  # as large as measured, see golden_comparison.py
    assert compare(golden, rounded, exact=False).ok
    assert not compare(golden, rounded, exact=True).ok
    exact = golden.logits.float() + torch.randn(3, VOCAB) * 1e-4
    assert compare(golden, exact, exact=True).ok


def test_small_tolerance_of_a_file_holds_for_float32_too():
    golden = dataclasses.replace(random_golden(), tolerance=EXACT_TOLERANCE / 100)
    logits = golden.logits + torch.randn(3, VOCAB) * EXACT_TOLERANCE / 20
    assert compare(dataclasses.replace(golden, tolerance=0.2), logits, exact=True).ok
    assert not compare(golden, logits, exact=True).ok
