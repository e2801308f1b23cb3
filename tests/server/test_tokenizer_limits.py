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

from .own_tokenizers import OwnWorld

CHAT = ChatPrompt((("user", "go"),))
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
# Each is one operation that Python does not interrupt.
POWER = "{{ (messages | length + 8) ** (9 ** 9) }}"
MEMORY = "{{ 'x' * 20000000000 }}"
OUTPUT = "{{ 'x' * 40000000 }}"
IF_TOLD = "{%% if messages[0].content == 'go' %%}%s{%% endif %%}[{{ messages[0].content }}]"


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> Iterator[OwnWorld]:
    world = OwnWorld(tiny_model, tmp_path_factory.mktemp("own"), render_s=2.0)
    yield world
    world.close()


def with_template(world, template):
    return world.tokenizers.make(TokenizerFiles({"chat_template.jinja": template.encode()}), None)


async def timed(awaitable):
    started = time.monotonic()
    try:
        return await awaitable, time.monotonic() - started
    except BadRequestError as error:
        return error, time.monotonic() - started


async def encode(world, tokenizer, prompt=CHAT):
    return await timed(world.encoder.encode(prompt, AdapterVocabulary(tokenizer)))


async def warm_up(world):
    own = with_template(world, "{{ messages[0].content }}!")
    for _ in range(2):
        await asyncio.gather(*(encode(world, own) for _ in range(4)))
    return own


@pytest.mark.parametrize("template", [LOOP, POWER], ids=["loop", "power"])
async def test_a_template_that_does_not_end_is_stopped(world, template):
    good = await warm_up(world)
    bad = with_template(world, IF_TOLD % template)
    assert not isinstance((await encode(world, bad, ChatPrompt((("user", "wait"),))))[0], BadRequestError)
    hanging = asyncio.create_task(encode(world, bad))
    await asyncio.sleep(0.1)
    longest = 0.0
    while not hanging.done():
        # Neither the base's prompts nor another adapter's wait, and the event loop goes on.
        ids, base_s = await encode(world, None)
        assert ids
        ids, own_s = await encode(world, good)
        assert ids == world.base.encode("go!", add_special_tokens=False)
        longest = max(longest, base_s, own_s)
        await asyncio.sleep(0.02)
    error, seconds = await hanging
    assert isinstance(error, BadRequestError)
    assert "took more than 2 s" in error.message
    assert seconds >= 1.9
    assert longest < 1.9
    # Its process was replaced.
    assert not isinstance((await encode(world, bad, ChatPrompt((("user", "wait"),))))[0], BadRequestError)


async def test_many_requests_of_one_hanging_template_take_one_process(world):
    good = await warm_up(world)
    bad = with_template(world, IF_TOLD % LOOP)
    hanging = [asyncio.create_task(encode(world, bad)) for _ in range(10)]
    await asyncio.sleep(0.1)
    for task in hanging[2:]:
        task.cancel()  # clients that leave leave nothing behind
    _, seconds = await encode(world, good)
    assert seconds < 1.9
    results = await asyncio.gather(*hanging[:2])
    assert all(isinstance(error, BadRequestError) for error, _ in results)
    _, seconds = await encode(world, bad, ChatPrompt((("user", "wait"),)))
    assert seconds < 12  # a process starts anew; the eight that were cancelled would have taken sixteen


@pytest.mark.parametrize("template", [MEMORY, OUTPUT], ids=["memory", "output"])
async def test_a_template_that_takes_everything_is_stopped(world, template):
    bad = with_template(world, IF_TOLD % template)
    error, _ = await encode(world, bad)
    assert isinstance(error, BadRequestError)


# The last one does not even compile in time: constants are computed then.
@pytest.mark.parametrize("template", [LOOP, MEMORY, OUTPUT, "{{ 9 ** (9 ** 9) }}"])
def test_loading_such_a_template_is_refused(world, template):
    with pytest.raises(AdapterInvalidError, match=r"too long|too much memory|characters"):
        with_template(world, template)
    assert with_template(world, "{{ messages[0].content }}?") is not None


async def test_a_rebuilt_process_learns_the_tokenizer_again(world):
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
