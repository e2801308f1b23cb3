"""Slow calls hold up no other kind, and calls that were given up leave nothing behind."""

import asyncio
import gc
import threading

import pytest
from lorikeet.adapters.errors import AdapterInvalidError
from lorikeet.protos.v1 import generation_pb2
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub
from lorikeet.server.adapter_service import LOAD_THREADS, WAIT_THREADS
from lorikeet.server.workers import Workers

from .fake_manager import FakeManager
from .fakes import call, error_of, serve, wait_for


@pytest.fixture
def manager():
    """Loads and pins block until the gates are opened, at the end of the test at the latest."""
    gates = {name: threading.Event() for name in ("load", "pin")}
    yield FakeManager(gates=gates)
    for gate in gates.values():
        gate.set()


def count(manager, method):
    return sum(name == method for name, *_ in manager.calls)


QUICK = [
    ("GetAdapter", {"adapter_id": "kjv"}),
    ("ListAdapters", {}),
    ("ListAliases", {}),
    ("SetAlias", {"alias": {"name": "prod", "targets": [{"adapter_id": "kjv"}]}}),
    ("UnpinAdapter", {"adapter_id": "kjv"}),
    ("PrefetchAdapter", {"adapter_id": "kjv"}),
    ("RollbackAdapter", {"adapter_id": "kjv"}),
    ("UnloadAdapter", {"adapter_id": "kjv"}),
]


async def test_any_number_of_slow_loads_holds_up_no_quick_call(manager):
    async with serve(manager) as (_, channel, _):
        loads = [asyncio.ensure_future(call(channel, "LoadAdapter", adapter_id=f"new-{n}")) for n in range(20)]
        await wait_for(lambda: count(manager, "load") == LOAD_THREADS)
        for method, fields in QUICK:
            await call(channel, method, deadline_s=60, **fields)
        stub = GenerationServiceStub(channel)
        assert (await stub.Generate(generation_pb2.GenerateRequest(prompt="x"), timeout=60)).text == "Hello world"
        assert count(manager, "load") == LOAD_THREADS
        manager.gates["load"].set()
        assert {response.adapter.adapter_id for response in await asyncio.gather(*loads)} == {
            f"new-{n}" for n in range(20)
        }
    assert not any(name == "MainThread" for name in manager.threads)


async def test_pins_that_wait_hold_up_no_load(manager):
    manager.gates["load"].set()
    async with serve(manager) as (_, channel, _):
        pins = [asyncio.ensure_future(call(channel, "PinAdapter", adapter_id="kjv")) for _ in range(WAIT_THREADS + 3)]
        await wait_for(lambda: count(manager, "pin") == WAIT_THREADS)
        await call(channel, "LoadAdapter", deadline_s=60, adapter_id="new")
        await call(channel, "UnpinAdapter", deadline_s=60, adapter_id="kjv")
        manager.gates["pin"].set()
        await asyncio.gather(*pins)
    assert count(manager, "pin") == WAIT_THREADS + 3


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_given_up_loads_leave_no_thread_and_no_queue_behind(manager, how):
    async with serve(manager) as (_, channel, _):
        tasks = len(asyncio.all_tasks())

        def loads(deadline_s=None):
            calls = [call(channel, "LoadAdapter", deadline_s, adapter_id=f"gone-{n}") for n in range(50)]
            return [asyncio.ensure_future(each) for each in calls]

        if how == "cancel":
            given_up = loads()
            await wait_for(lambda: count(manager, "load") == LOAD_THREADS)
            for each in given_up:
                each.cancel()
            await asyncio.wait(given_up)
        else:
            deadline_s = 0.5
            while count(manager, "load") < LOAD_THREADS:  # again, where their time was over before they arrived
                for each in loads(deadline_s):
                    assert (await error_of(each)).code == "DEADLINE_EXCEEDED"
                deadline_s *= 2
        await wait_for(lambda: len(asyncio.all_tasks()) <= tasks)  # the server has heard of it
        later = [
            asyncio.ensure_future(call(channel, "LoadAdapter", adapter_id=f"new-{n}")) for n in range(LOAD_THREADS)
        ]
        manager.gates["load"].set()
        assert [(await each).adapter.adapter_id for each in later] == [f"new-{n}" for n in range(LOAD_THREADS)]
    # What a thread had begun went on to its end; what had not begun never did.
    assert count(manager, "load") == 2 * LOAD_THREADS


async def test_failure_that_nobody_waits_for_any_more_is_no_trouble(manager):
    never_retrieved: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: never_retrieved.append(context))
    manager.fail = AdapterInvalidError("No.")
    async with serve(manager) as (_, channel, _):
        loads = [asyncio.ensure_future(call(channel, "LoadAdapter", adapter_id=f"gone-{n}")) for n in range(9)]
        await wait_for(lambda: count(manager, "load") == LOAD_THREADS)
        for load in loads:
            load.cancel()
        await asyncio.wait(loads)
        manager.gates["load"].set()
        error = await error_of(call(channel, "LoadAdapter", adapter_id="new", deadline_s=60))
    assert error.reason == "ADAPTER_INVALID"
    gc.collect()
    assert never_retrieved == []


async def test_server_ends_while_a_load_is_stuck(manager):
    async with serve(manager) as (server, channel, _):
        load = asyncio.ensure_future(call(channel, "LoadAdapter", adapter_id="new"))
        await wait_for(lambda: count(manager, "load"))
        await server.stop(0)
        assert (await error_of(load)).code in ("UNAVAILABLE", "CANCELLED")


async def test_workers_run_so_many_at_a_time_and_begin_nothing_that_was_cancelled():
    workers, gate, running = Workers("test", 2), threading.Event(), []

    def work(number):
        running.append(number)
        assert gate.wait(90)
        return number

    tasks = [asyncio.ensure_future(workers.run(lambda n=n: work(n))) for n in range(6)]
    await wait_for(lambda: len(running) == 2)
    for task in tasks[1:5]:
        task.cancel()
    await asyncio.wait(tasks[1:5])
    assert workers._executor._work_queue.qsize() == 0
    gate.set()
    assert (await tasks[0], await tasks[5]) == (0, 5)
    assert sorted(running) == [0, 1, 5] and running[2] == 5  # of two threads either is the first
    # Every thread is free again, also the one whose caller went away.
    both = threading.Barrier(2)
    assert len({await task for task in [asyncio.ensure_future(workers.run(lambda: both.wait(90))) for _ in "ab"]}) == 2
    workers.close()
