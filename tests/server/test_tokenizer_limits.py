"""Templates and tokenizers that do not end, or take everything: they are stopped, and nobody else feels it."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lorikeet.adapters.adapter_tokenizer import AdapterVocabulary
from lorikeet.adapters.errors import AdapterInvalidError
from lorikeet.adapters.tokenizer_files import TokenizerFiles
from lorikeet.server.errors import BadRequestError
from lorikeet.server.prompts import ChatPrompt, TextPrompt
from lorikeet.server.tokenizer_client import LateError, TokenizerProcess

from .fakes import PATIENCE_S
from .own_tokenizers import OwnWorld

CHAT = ChatPrompt((("user", "go"),))
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
# Each is one operation that Python does not interrupt.
POWER = "{{ (messages | length + 8) ** (9 ** 9) }}"
MEMORY = "{{ 'x' * 20000000000 }}"
OUTPUT = "{{ 'x' * 40000000 }}"
# Of what answers beside a template that hangs for two seconds: a machine may halt for as long.
TRIES = 10
IF_TOLD = "{%% if messages[0].content == 'go' %%}%s{%% endif %%}[{{ messages[0].content }}]"


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> Iterator[OwnWorld]:
    world = OwnWorld(tiny_model, tmp_path_factory.mktemp("own"), render_s=2.0)
    yield world
    world.close()


def with_template(world, template):
    return world.tokenizers.make(TokenizerFiles({"chat_template.jinja": template.encode()}), None)


async def encode(world, tokenizer, prompt=CHAT):
    """Token ids, or the refusal."""
    try:
        return await world.encoder.encode(prompt, AdapterVocabulary(tokenizer))
    except BadRequestError as error:
        return error


async def warm_up(world):
    own = with_template(world, "{{ messages[0].content }}!")
    for _ in range(2):
        await asyncio.gather(*(encode(world, own) for _ in range(4)))
    return own


@pytest.mark.parametrize("template", [LOOP, POWER], ids=["loop", "power"])
async def test_a_template_that_does_not_end_is_stopped(world, template, monkeypatch):
    good = await warm_up(world)
    bad = with_template(world, IF_TOLD % template)
    answered = 0
    for _ in range(TRIES):
        hanging, started = asyncio.create_task(encode(world, bad)), time.monotonic()
        await asyncio.sleep(0.1)
        while not hanging.done():
            # Neither the base's prompts nor another adapter's wait, and the event loop goes on.
            ids, own_ids = await encode(world, None), await encode(world, good)
            answered += not hanging.done() and own_ids == world.base.encode("go!", add_special_tokens=False)
            assert ids
            await asyncio.sleep(0.02)
        error = await hanging
        assert isinstance(error, BadRequestError)
        assert "took more than 2 s" in error.message
        assert time.monotonic() - started >= 1.9
        if answered:
            break
    assert answered
    # Its process was replaced.
    monkeypatch.setattr(world.tokenizers, "_render_s", PATIENCE_S)
    assert not isinstance(await encode(world, bad, ChatPrompt((("user", "wait"),))), BadRequestError)


async def test_many_requests_of_one_hanging_template_take_one_process(world, monkeypatch):
    good = await warm_up(world)
    bad = with_template(world, IF_TOLD % LOOP)
    asked = []
    encode_one = world.tokenizers._encode
    monkeypatch.setattr(world.tokenizers, "_encode", lambda *each: (asked.append(each[0]), encode_one(*each))[1])
    for _ in range(TRIES):
        asked.clear()
        hanging = [asyncio.create_task(encode(world, bad)) for _ in range(10)]
        await asyncio.sleep(0.1)
        for task in hanging[2:]:
            task.cancel()  # clients that leave leave nothing behind
        ids = await encode(world, good)
        is_beside = not hanging[0].done() and ids == world.base.encode("go!", add_special_tokens=False)
        results = await asyncio.gather(*hanging[:2])
        assert all(isinstance(error, BadRequestError) for error in results)
        assert asked.count(bad) == 2
        if is_beside:
            break
    assert is_beside


@pytest.mark.parametrize("template", [MEMORY, OUTPUT], ids=["memory", "output"])
async def test_a_template_that_takes_everything_is_stopped(world, template):
    bad = with_template(world, IF_TOLD % template)
    error = await encode(world, bad)
    assert isinstance(error, BadRequestError)


# The last one does not even compile in time: constants are computed then.
@pytest.mark.parametrize("template", [LOOP, MEMORY, OUTPUT, "{{ 9 ** (9 ** 9) }}"])
def test_loading_such_a_template_is_refused(world, template):
    with pytest.raises(AdapterInvalidError, match=r"too long|too much memory|characters"):
        with_template(world, template)
    assert with_template(world, "{{ messages[0].content }}?") is not None


async def test_a_rebuilt_process_learns_the_tokenizer_again(world, monkeypatch):
    monkeypatch.setattr(world.tokenizers, "_render_s", PATIENCE_S)
    oracle, files = world.saved(lambda tokenizer: tokenizer.add_tokens(["<zorp>"]))
    own = world.tokenizers.make(files, world.size + 1)
    vocabulary = AdapterVocabulary(own, world.size + 1)
    prompt = TextPrompt("a <zorp> and a cat")
    assert await world.encoder.encode(prompt, vocabulary) == oracle.encode(prompt.text)
    for process in world.tokenizers._processes:
        if process._process is not None:
            process._process.kill()
            process._process.wait()
    assert await world.encoder.encode(prompt, vocabulary) == oracle.encode(prompt.text)


def test_a_process_knows_none_of_the_server_s_secrets(world, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    process = TokenizerProcess(world.tokenizers._loading._base)
    try:
        process.start()
        environment = Path(f"/proc/{process._process.pid}/environ")
        if environment.exists():
            assert b"SECRET" not in environment.read_bytes()
    finally:
        process.close()
    with pytest.raises(LateError):  # closed, it answers nobody
        process.start()
