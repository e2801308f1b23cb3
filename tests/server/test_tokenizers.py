"""Adapters' own tokenizers against transformers: what is dropped, how prompts become ids, and ids text."""

import json
import random
from collections.abc import Iterator

import pytest
from lorikeet.adapters.adapter_tokenizer import AdapterVocabulary
from lorikeet.adapters.errors import AdapterInvalidError, AdapterMemoryError
from lorikeet.adapters.tokenizer_files import TOKENIZER_FILE, TokenizerFiles
from lorikeet.server.errors import BadRequestError
from lorikeet.server.prompts import ChatPrompt, TextPrompt, TokenPrompt
from tokenizers import normalizers

from .own_tokenizers import OwnWorld

OTHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (("system", "Be brief."), ("user", " Who are you, <zorp>? 日本🦜 "))


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> Iterator[OwnWorld]:
    world = OwnWorld(tiny_model, tmp_path_factory.mktemp("own"))
    yield world
    world.close()


def extend(tokenizer) -> None:
    tokenizer.add_tokens(["<zorp>", "quux"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})


def retemplate(tokenizer) -> None:
    tokenizer.chat_template = OTHER_TEMPLATE


def pad_and_cut(tokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.enable_padding(length=512)
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.model_max_length = 77


async def encoded(world, tokenizer, prompt, size=None):
    return await world.encoder.encode(prompt, AdapterVocabulary(tokenizer, size))


def chat_ids(tokenizer, messages):
    conversation = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("change", [lambda _: None, pad_and_cut], ids=["same", "pads and cuts"])
@pytest.mark.parametrize("settings", [{}, {"save_jinja_files": False}], ids=["jinja file", "jinja in the config"])
def test_one_that_does_the_same_costs_nothing(world, change, settings):
    _, files = world.saved(change, **settings)
    assert world.tokenizers.make(files, None) is None


def test_written_otherwise_it_is_still_the_same(world):
    _, files = world.saved(lambda _: None)
    content = {**files.files, TOKENIZER_FILE: json.dumps(json.loads(files.files[TOKENIZER_FILE])).encode()}
    assert content[TOKENIZER_FILE] != files.files[TOKENIZER_FILE]
    assert world.tokenizers.make(TokenizerFiles(content), None) is None


def test_no_files_no_tokenizer(world):
    assert world.tokenizers.make(TokenizerFiles(), None) is None
    assert world.encoder.rules(AdapterVocabulary()) is None


async def test_added_tokens_read_and_write_as_transformers_does(world):
    oracle, files = world.saved(extend)
    size = len(oracle)
    own = world.tokenizers.make(files, size)
    text = "the cat <zorp>quux <|call|> naïve 🦜<eos>"
    assert await encoded(world, own, TextPrompt(text), size) == oracle.encode(text)
    assert max(oracle.encode(text)) >= world.size
    assert await encoded(world, own, ChatPrompt(CHAT), size) == chat_ids(oracle, CHAT)
    rules = world.encoder.rules(AdapterVocabulary(own, size))
    numbers = random.Random(7)
    for _ in range(300):
        ids = [numbers.choice([numbers.randrange(size), numbers.randrange(world.size, size)]) for _ in range(12)]
        assert rules.decode(ids) == oracle.backend_tokenizer.decode(ids)


async def test_another_template_with_the_base_s_tokens(world):
    oracle, files = world.saved(retemplate)
    own = world.tokenizers.make(files, None)
    assert own.backend is None
    assert await encoded(world, own, ChatPrompt(CHAT)) == chat_ids(oracle, CHAT)
    assert chat_ids(oracle, CHAT) != chat_ids(world.base, CHAT)
    assert await encoded(world, own, TextPrompt("a cat")) == world.base.encode("a cat")
    assert world.encoder.rules(AdapterVocabulary(own)).decode is None  # as the base's


async def test_another_normalizer_is_another_tokenizer(world):
    def change(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    oracle, files = world.saved(change)
    own = world.tokenizers.make(files, None)
    text = "The Quick Brown FOX"
    assert await encoded(world, own, TextPrompt(text)) == oracle.encode(text) != world.base.encode(text)
    assert not own.detokenization.changed


def test_another_end_of_sequence(world):
    def change(tokenizer):
        tokenizer.eos_token = "<pad>"

    oracle, files = world.saved(change)
    own = world.tokenizers.make(files, None)
    assert own.backend is None
    assert own.template is None
    rules = world.encoder.rules(AdapterVocabulary(own))
    assert rules.eos_token_ids == world.eos | {oracle.eos_token_id}


async def test_tokens_that_only_the_config_names_are_added(world):
    _, files = world.saved(lambda _: None)
    config = json.loads(files.files["tokenizer_config.json"])
    config["extra_special_tokens"] = ["<|new|>"]
    content = {**files.files, "tokenizer_config.json": json.dumps(config).encode()}
    folder = world.scratch / "named"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    oracle = type(world.base).from_pretrained(folder)
    own = world.tokenizers.make(TokenizerFiles(content), world.size + 1)
    assert await encoded(world, own, TextPrompt("a<|new|>b"), world.size + 1) == oracle.encode("a<|new|>b")


def test_old_special_tokens_map(world):
    _, files = world.saved(lambda _: None)
    config = json.loads(files.files["tokenizer_config.json"])
    config.pop("added_tokens_decoder", None)
    content = {
        **files.files,
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": json.dumps({"eos_token": {"content": "<bos>", "lstrip": False}}).encode(),
    }
    own = world.tokenizers.make(TokenizerFiles(content), None)
    assert own.eos_token_ids == {world.base.convert_tokens_to_ids("<bos>")}


def test_equal_ones_are_one(world):
    _, files = world.saved(extend)
    first = world.tokenizers.make(files, world.size + 3)
    _, again = world.saved(extend)
    assert world.tokenizers.make(again, world.size + 3) is first

    def both(tokenizer):
        extend(tokenizer)
        retemplate(tokenizer)

    _, files = world.saved(both)
    third = world.tokenizers.make(files, world.size + 3)
    assert third is not first
    assert third.backend is first.backend


def test_memory_is_bounded(tiny_model, tmp_path):
    world = OwnWorld(tiny_model, tmp_path, max_kept_bytes=30_000)
    try:
        kept = []
        with pytest.raises(AdapterMemoryError, match="30000 bytes together"):
            for number in range(20):
                _, files = world.saved(lambda tokenizer, number=number: tokenizer.add_tokens([f"<t{number}>"]))
                kept.append(world.tokenizers.make(files, world.size + 1))
        assert len(kept) >= 2
        kept.clear()  # unloaded: there is room again
        assert world.tokenizers.make(files, world.size + 1) is not None
    finally:
        world.close()


async def test_ids_are_checked_against_the_adapter_s_vocabulary(world):
    vocabulary = AdapterVocabulary(None, world.size + 2)
    assert await world.encoder.encode(TokenPrompt((world.size + 1,)), vocabulary) == [world.size + 1]
    with pytest.raises(BadRequestError, match=rf"the adapter's vocabulary is 0 to {world.size + 1}\."):
        await world.encoder.encode(TokenPrompt((world.size + 2,)), vocabulary)
    for wrong in (-1, world.size + 2):
        with pytest.raises(BadRequestError, match=rf"token_ids contains {wrong} \(at position 2\); the adapter's"):
            await world.encoder.encode(TokenPrompt((0, world.size + 1, wrong, -5)), vocabulary)
    with pytest.raises(BadRequestError, match=rf"the base's vocabulary is 0 to {world.size - 1}\."):
        await world.encoder.encode(TokenPrompt((world.size,)))
    # An adapter of fewer rows than the base, and the base's tokenizer.
    with pytest.raises(BadRequestError, match="the adapter's vocabulary is 0 to 4"):
        await world.encoder.encode(TextPrompt("the cat"), AdapterVocabulary(None, 5))


async def test_messages_that_the_template_refuses(world):
    def change(tokenizer):
        tokenizer.chat_template = "{{ raise_exception('only ' ~ messages[0].role ~ 's?') }}"

    _, files = world.saved(change)
    own = world.tokenizers.make(files, None)  # refusing our own message is no reason to refuse the adapter
    with pytest.raises(BadRequestError, match=r"adapter's chat template refuses.*system, user"):
        await encoded(world, own, ChatPrompt(CHAT))


def raw(files, edit):
    value = json.loads(files.files[TOKENIZER_FILE])
    edit(value)
    return {**files.files, TOKENIZER_FILE: json.dumps(value).encode()}


CONFIG = "tokenizer_config.json"
JINJA = "chat_template.jinja"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({TOKENIZER_FILE: b'{"version": "1.0", "added_tokens": ['}, "can read"),
        ({TOKENIZER_FILE: b"{}"}, "can read"),
        ({TOKENIZER_FILE: b""}, "can read"),
        ({TOKENIZER_FILE: b"\xff\xfe\x00"}, "can read"),
        ({CONFIG: b"[1]"}, "no JSON object"),
        ({CONFIG: b"[" * 100_000}, "no JSON object"),
        ({CONFIG: b'{"added_tokens_decoder": {"x": {"content": "y"}}}'}, "no number"),
        ({CONFIG: b'{"added_tokens_decoder": {"7": {"what": "y"}}}'}, "malformed added_tokens_decoder"),
        ({"added_tokens.json": b'{"y": null}', CONFIG: b"{}"}, "no number"),
        ({JINJA: b"{% for message in %}"}, "not valid in line 1"),
        ({JINJA: b"\n\n{% if 1 %}"}, "not valid in line 3"),
        ({JINJA: b"{{ ''.__class__.__mro__() }}"}, "may not do"),
        ({JINJA: b"{{ messages.append(1) }}"}, "may not do"),
        ({JINJA: b"\xff"}, "not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_our_words(world, bad, message):
    _, files = world.saved(lambda _: None)
    with pytest.raises(AdapterInvalidError, match=message) as caught:
        world.tokenizers.make(TokenizerFiles({**files.files, **bad}), None)
    assert str(world.scratch) not in caught.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 3}, "no text"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "none of them is called 'default'"),
        ({"eos_token": "<nope>"}, "'<nope>', which is not in its vocabulary"),
    ],
)
def test_bad_settings_without_a_tokenizer_json(world, config, message):
    with pytest.raises(AdapterInvalidError, match=message):
        world.tokenizers.make(TokenizerFiles({CONFIG: json.dumps(config).encode()}), None)


def test_the_default_of_several_templates(world):
    templates = [{"name": "rag", "template": "x"}, {"name": "default", "template": OTHER_TEMPLATE}]
    own = world.tokenizers.make(TokenizerFiles({CONFIG: json.dumps({"chat_template": templates}).encode()}), None)
    assert own.template == OTHER_TEMPLATE


def test_ids_beyond_the_vocabulary_are_refused(world):
    _, files = world.saved(extend)
    with pytest.raises(AdapterInvalidError, match=rf"'<zorp>' the id {world.size}.*0 to {world.size - 1}\."):
        world.tokenizers.make(files, None)
    with pytest.raises(AdapterInvalidError, match=rf"the id {world.size + 2}"):
        world.tokenizers.make(files, world.size + 2)


def test_a_decoder_with_a_regular_expression_is_refused(world):
    _, files = world.saved(extend)
    decoder = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    content = raw(files, lambda value: value.update(decoder=decoder))
    with pytest.raises(AdapterInvalidError, match="regular expression"):
        world.tokenizers.make(TokenizerFiles(content), world.size + 3)


def test_custom_code_is_never_run(world, tmp_path):
    _, files = world.saved(retemplate)
    config = json.loads(files.files["tokenizer_config.json"])
    marker = tmp_path / "ran"
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own", "tokenizer_file": "/none"}
    code = f"open({str(marker)!r}, 'w')".encode()
    content = {**files.files, "tokenizer_config.json": json.dumps(config).encode(), "own.py": code}
    assert world.tokenizers.make(TokenizerFiles(content), None).template == OTHER_TEMPLATE
    assert not marker.exists()
