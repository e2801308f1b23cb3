"""Lists come in pages that neither miss nor repeat what stays while other things come and go."""

import base64
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorikeet.adapters.info import AdapterState, AliasInfo, AliasTarget
from lorikeet.protos.v1 import adapters_pb2 as pb
from lorikeet.server.errors import BadRequestError
from lorikeet.server.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, read_page_request

from .fake_manager import KJV, FakeManager
from .fakes import call, error_of, serve


def alias(name):
    return AliasInfo(name, (AliasTarget("kjv", "d" * 64, 1.0),))


async def all_pages(channel, method, names, between=lambda: None):
    """The names of every page, one list a page; `between` runs after each."""
    pages, token = [], ""
    while True:
        page = await call(channel, method, page_size=10, page_token=token)
        pages.append(names(page))
        between()
        token = page.next_page_token
        if not token:
            return pages


async def test_pages_cover_every_adapter_once_while_some_come_and_go():
    infos = [dataclasses.replace(KJV, adapter_id=f"a{number:03}") for number in range(25)]
    draining = dataclasses.replace(infos[9], state=AdapterState.DRAINING, digest="0" * 64, current=False)
    manager = FakeManager([draining, *reversed(infos)])

    def churn():
        manager.infos = [info for info in manager.infos if info.adapter_id != "a003"]
        manager.infos.append(dataclasses.replace(KJV, adapter_id="a0005"))

    async with serve(manager) as (_, channel, _):
        pages = await all_pages(
            channel,
            "ListAdapters",
            lambda page: [(adapter.adapter_id, adapter.state) for adapter in page.adapters],
            churn,
        )
    expected = [(info.adapter_id, pb.ADAPTER_STATE_READY) for info in infos]
    expected.insert(10, ("a009", pb.ADAPTER_STATE_DRAINING))
    assert [entry for page in pages for entry in page] == expected
    assert [len(page) for page in pages] == [10, 10, 6]


async def test_pages_cover_every_alias_once_while_some_go():
    names = [f"alias-{number:03}" for number in range(20)]
    manager = FakeManager(aliases={name: alias(name) for name in reversed(names)})
    async with serve(manager) as (_, channel, _):
        pages = await all_pages(
            channel,
            "ListAliases",
            lambda page: [alias.name for alias in page.aliases],
            lambda: manager.aliases.pop("alias-000", None),
        )
    assert pages == [names[:10], names[10:]]


@pytest.mark.parametrize("method", ["ListAdapters", "ListAliases"])
async def test_empty_list_is_one_empty_page(method):
    async with serve(FakeManager([])) as (_, channel, _):
        page = await call(channel, method)
    assert (page.ByteSize(), page.next_page_token) == (0, "")


async def test_page_without_a_size_has_the_documented_one():
    infos = [dataclasses.replace(KJV, adapter_id=f"a{number:04}") for number in range(MAX_PAGE_SIZE + 1)]
    async with serve(FakeManager(infos)) as (_, channel, _):
        assert len((await call(channel, "ListAdapters")).adapters) == DEFAULT_PAGE_SIZE
        page = await call(channel, "ListAdapters", page_size=MAX_PAGE_SIZE)
    assert len(page.adapters) == MAX_PAGE_SIZE
    assert page.next_page_token


def encode(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize("method", ["ListAdapters", "ListAliases"])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": "käse"}, "page_token"),
        ({"page_token": encode(5)}, "page_token"),
        ({"page_token": encode([])}, "page_token"),
        ({"page_token": encode(["a", "b"])}, "page_token"),
        ({"page_token": encode([1])}, "page_token"),
        ({"page_token": encode(["a", 0, "", ""])}, "page_token"),
    ],
    ids=str,
)
async def test_bad_page_is_refused(method, fields, field):
    manager = FakeManager()
    async with serve(manager) as (_, channel, _):
        error = await error_of(call(channel, method, **fields))
    assert (error.code, error.reason, error.metadata["field"]) == ("INVALID_ARGUMENT", "BAD_REQUEST", field)
    assert manager.calls == []


async def test_token_of_one_list_is_none_of_the_other():
    infos = [dataclasses.replace(KJV, adapter_id=f"a{number}") for number in range(3)]
    async with serve(FakeManager(infos)) as (_, channel, _):
        token = (await call(channel, "ListAdapters", page_size=1)).next_page_token
        error = await error_of(call(channel, "ListAliases", page_token=token))
    assert error.metadata["field"] == "page_token"


KEYS = st.lists(st.tuples(st.text(max_size=5), st.booleans()), unique=True, max_size=40)


@given(keys=KEYS, size=st.integers(1, 12), gone=st.data())
def test_what_stays_is_listed_exactly_once(keys, size, gone):
    """In whatever order the list comes, and whatever else disappears between two pages."""
    left, seen, token = list(keys), [], ""
    while True:
        page = read_page_request(size, token, ("", False)).of(left, lambda key: key)
        assert page.items == sorted(page.items)
        seen += page.items
        token = page.next_token
        if not token:
            break
        removed = gone.draw(st.sampled_from(left))
        left = [key for key in left if key != removed]
    assert seen == sorted(set(seen))
    assert set(left) <= set(seen) <= set(keys)


@given(st.one_of(st.text(max_size=40), st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode())))
def test_any_other_token_is_refused_and_never_fails_otherwise(token):
    try:
        assert read_page_request(1, token, ("",)).after == () or token
    except BadRequestError as error:
        assert error.metadata["field"] == "page_token"
