"""Text piece by piece: characters and stop strings that span tokens, spaces that depend on what comes before."""

import copy
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorikeet.server.engine.detokenizer import Detokenizer, DetokenizerFactory
from lorikeet.server.engine.request import Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.stop_strings import StopStrings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Hello there, general. It is over now.",
    "Grüße aus Köln, naïve café.",
    "emoji 😀 family 👨‍👩‍👧‍👦 flag 🇩🇪 done",
    "你好，世界。今天天气很好。",
    "a\n\nb\t c  d",
    "replacement \ufffd itself",
]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with hardly any merges: most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello there general over now is it"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Metaspace with byte fallback, as Llama 2 and Gemma have it: the first token's leading space is dropped."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "▁": 3, "a": 4, "▁the": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def request_of(prompt, **params) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens=10**6, **params), None, lambda _: None)


def pieces(tokenizer, prompt, token_ids, **params) -> tuple[list[str], str | None]:
    """What is shown after each token and at the end, and the stop string that was found."""
    stream = DetokenizerFactory(tokenizer)(request_of(prompt, **params))
    shown = []
    for token_id in token_ids:
        shown.append(stream.push(token_id, may_stop=True))
        if stream.stop is not None:
            return shown, stream.stop
    return [*shown, stream.finish()], stream.stop


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_no_character_is_broken(byte_level, text):
    ids = byte_level.encode(text)
    shown, _ = pieces(byte_level, byte_level.encode("Say: "), ids)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in shown)


def test_emoji_spanning_four_tokens_comes_whole_with_the_last_one(byte_level):
    ids = byte_level.encode("😀")
    assert len(ids) == 4
    assert pieces(byte_level, byte_level.encode("x"), ids)[0] == ["", "", "", "😀", ""]


def test_text_before_an_unfinished_character_is_not_held_back():
    """One token can end with the first bytes of a character."""
    tokens = [b"abc", b"d\xf0\x9f", b"\x98", b"\x80e\xe4", b"\xbd\xa0", b"!"]

    def decode(ids):
        return b"".join(tokens[i] for i in ids).decode(errors="replace")

    stream = Detokenizer(decode, [], StopStrings([], include_stop=False))
    shown = [stream.push(i, may_stop=True) for i in range(len(tokens))]
    assert shown == ["abc", "d", "", "😀e", "你", "!"]


def test_characters_that_never_align_with_tokens_stream_all_the_same():
    text = "你好世界今天天气很好" * 12
    data = text.encode()
    tokens = [data[:2]] + [data[i : i + 3] for i in range(2, len(data), 3)]

    def decode(ids):
        return b"".join(tokens[i] for i in ids).decode(errors="replace")

    stream = Detokenizer(decode, [], StopStrings([], include_stop=False))
    shown = ""
    for i in range(60):
        shown += stream.push(i, may_stop=True)
        assert len(text[: i + 1]) - len(shown) <= 1
    assert text.startswith(shown)


def test_bytes_that_are_no_text_are_shown_in_the_end(byte_level):
    emoji = byte_level.encode("😀")
    assert pieces(byte_level, [], emoji[:2])[0] == ["", "", "\ufffd"]
    shown, _ = pieces(byte_level, [], [*emoji[:3], *byte_level.encode("ok")])
    assert "".join(shown) == "\ufffdok"
    endless, _ = pieces(byte_level, [], emoji[1:2] * 200)
    assert any(endless[:100]), "held back for ever"
    assert "".join(endless) == "\ufffd" * 200


@pytest.mark.parametrize("text", TEXTS[:4])
def test_long_output_is_the_text_too(byte_level, text):
    ids = byte_level.encode(text) * 30
    assert "".join(pieces(byte_level, byte_level.encode("p"), ids)[0]) == text * 30


def test_leading_space_depends_on_the_prompt(sentencepiece_like):
    assert "".join(pieces(sentencepiece_like, [1], [2, 2])[0]) == " world world"
    assert "".join(pieces(sentencepiece_like, [], [1, 2])[0]) == "Hello world"


def test_byte_fallback_tokens_form_characters(sentencepiece_like):
    ids = [6 + byte for byte in "é😀你好".encode()]
    shown, _ = pieces(sentencepiece_like, [1], [2, *ids, 5])
    assert "".join(shown) == " worldé😀你好 the"
    assert all("\ufffd" not in piece for piece in shown)


def test_long_run_of_byte_fallback_tokens(sentencepiece_like):
    text = "你好世界今天天气很好" * 10
    ids = [6 + byte for byte in text.encode()]
    assert "".join(pieces(sentencepiece_like, [1], ids)[0]) == text


def test_special_tokens_are_left_out_unless_asked_for(byte_level):
    ids = [*byte_level.encode("hello"), 0, *byte_level.encode(" there")]
    assert "".join(pieces(byte_level, [0], ids)[0]) == "hello there"
    stream = DetokenizerFactory(byte_level, skip_special_tokens=False)(request_of([0]))
    assert "".join(stream.push(token, may_stop=True) for token in ids) == "hello<eos> there"


def test_prompt_text_is_not_shown(byte_level):
    for length in range(1, 20):
        prompt = byte_level.encode("A prompt 😀 of some length")[:length]
        shown, _ = pieces(byte_level, prompt, byte_level.encode(" and"))
        assert "".join(shown).endswith(" and"), length
        assert "prompt" not in "".join(shown)


def test_tokenizer_in_use_by_another_thread_is_not_shared(byte_level):
    factory = DetokenizerFactory(byte_level)
    byte_level.add_special_tokens({"additional_special_tokens": ["<new>"]})
    new = byte_level.convert_tokens_to_ids("<new>")
    stream = factory(request_of([0]))
    assert stream.push(new, may_stop=True) == ""


def test_stop_string_spanning_tokens_cuts_precisely(byte_level):
    ids = byte_level.encode("It is over now. And more")
    shown, stop = pieces(byte_level, [0], ids, stop=("r no",))
    assert "".join(shown) == "It is ove"
    assert stop == "r no"


def test_include_stop_keeps_the_stop_string_and_nothing_behind_it(byte_level):
    ids = byte_level.encode("It is over now. And more")
    shown, _ = pieces(byte_level, [0], ids, stop=("r no",), include_stop=True)
    assert "".join(shown) == "It is over no"


def test_possible_beginning_of_a_stop_string_is_held_back_and_released():
    stops = StopStrings(["abcd"], include_stop=False)
    assert [stops.push(text) for text in ("xa", "b", "c", "x", "ab")] == ["x", "", "", "abcx", ""]
    assert stops.flush() == "ab"
    assert stops.found is None


def test_overlapping_beginnings_are_held_back():
    stops = StopStrings(["aab"], include_stop=False)
    assert [stops.push(text) for text in ("a", "a", "a", "b", "zzz")] == ["", "", "a", "", ""]
    assert stops.found == "aab"


def test_first_stop_string_to_be_complete_wins_and_of_several_the_longest():
    stops = StopStrings(["bc", "abcd", "abc"], include_stop=False)
    assert stops.push("xabcd") == "x"
    assert stops.found == "abc"


def test_stop_string_of_a_split_emoji(byte_level):
    shown, stop = pieces(byte_level, [0], byte_level.encode("so 😀 it ends"), stop=("😀",))
    assert "".join(shown) == "so "
    assert stop == "😀"


def test_stop_string_can_be_found_in_what_is_left_at_the_end(byte_level):
    emoji = byte_level.encode("😀")
    shown, stop = pieces(byte_level, [0], [*byte_level.encode("a"), *emoji[:2]], stop=("a\ufffd",))
    assert "".join(shown) == ""
    assert stop == "a\ufffd"


def test_stop_strings_before_min_tokens_pass(byte_level):
    stream = DetokenizerFactory(byte_level)(request_of([0], stop=("a",)))
    a = byte_level.encode("a")[0]
    assert stream.push(a, may_stop=False) == "a"
    assert stream.stop is None
    assert stream.push(a, may_stop=True) == ""
    assert stream.stop == "a"


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    include_stop=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, include_stop, seed):
    rng = random.Random(seed)
    finder = StopStrings(stops, include_stop=include_stop)
    shown, position = "", 0
    while position < len(text):
        size = rng.randint(1, 5)
        shown += finder.push(text[position : position + size])
        position += size
    shown += finder.flush()
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert shown == text and finder.found is None
        return
    longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert finder.found == longest
    assert shown == text[: ends[0] if include_stop else ends[0] - len(longest)]


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(["kea", AddedToken("kaka", normalized=False, lstrip=True)])
    tokenizer.add_special_tokens(["<|sep|>"])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def with_a_gap(tokenizer: Tokenizer) -> Tokenizer:
    """As files can have it: ids that no token has."""
    described = json.loads(tokenizer.to_str())
    described["added_tokens"].append(described["added_tokens"][0] | {"id": 4000, "content": "<|far|>"})
    return Tokenizer.from_str(json.dumps(described))


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_padding(pad_id=0, pad_token="<eos>")
    tokenizer.enable_truncation(10)
    return tokenizer


@pytest.mark.parametrize("change", [lambda t: t, with_added_tokens, with_a_gap, with_padding])
def test_twin_is_the_same_and_its_settings_are_its_own(change, byte_level, sentencepiece_like):
    for wrapper in (byte_level, sentencepiece_like):
        tokenizer = change(copy.deepcopy(wrapper.backend_tokenizer))
        twin = DetokenizerFactory(tokenizer).backend
        before = tokenizer.to_str()
        assert twin.to_str() == before and twin is not tokenizer
        ids = tokenizer.encode(" ".join(TEXTS) + "kea kaka<|sep|>").ids
        assert twin.decode(ids) == tokenizer.decode(ids)
        tokenizer.enable_truncation(3)
        tokenizer.add_tokens(["tui"])
        assert twin.to_str() == before


def test_decoding_goes_on_while_prompts_are_tokenized(byte_level):
    tokenizer = copy.deepcopy(byte_level.backend_tokenizer)
    factory = DetokenizerFactory(tokenizer)
    ids = tokenizer.encode(TEXTS[1]).ids
    text = tokenizer.decode(ids)
    done = threading.Event()

    def tokenize() -> None:
        while not done.is_set():
            tokenizer.enable_truncation(512)
            tokenizer.encode_batch(TEXTS * 4)
            tokenizer.no_truncation()

    with ThreadPoolExecutor(1) as pool:
        tokenizing = pool.submit(tokenize)
        assert {factory.backend.decode(ids) for _ in range(2000)} == {text}
        done.set()
        tokenizing.result()
