"""Events reach the loop in order, waiting ones are joined, and the terminal one is last."""

import asyncio
import threading

import pytest
from lorikeet.server.engine.request import Delta, Failed, Finished, FinishReason, TokenLogprob
from lorikeet.server.errors import DeadlineError
from lorikeet.server.event_stream import EventBridge, EventStream

from .fakes import wait_for

END = Finished(FinishReason.LENGTH, 1, 0, 3)


async def test_waiting_deltas_are_joined():
    stream = EventStream()
    logprobs = (TokenLogprob(1, -1.0), TokenLogprob(2, -2.0))
    stream.push(Delta("a", (1,), logprobs[:1]))
    stream.push(Delta("", (2,), logprobs[1:]))
    stream.push(Delta("b", ()))
    stream.push(END)
    assert [event async for event in stream] == [Delta("ab", (1, 2), logprobs), END]


async def test_output_before_a_failure_is_delivered_first():
    stream = EventStream()
    stream.push(Delta("a", (1,)))
    stream.push(Failed(DeadlineError("too late")))
    assert stream.ended
    events = []
    with pytest.raises(DeadlineError, match="too late"):
        async for event in stream:
            events.append(event)
    assert events == [Delta("a", (1,))]


async def test_what_comes_while_the_reader_is_busy_belongs_to_the_next_round():
    stream = EventStream()
    stream.push(Delta("a", (1,)))
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 1:
            stream.push(Delta("b", (2,)))
            stream.push(Delta("c", (3,)))
            stream.push(END)
    assert seen == [Delta("a", (1,)), Delta("bc", (2, 3)), END]


async def test_bridge_loses_and_reorders_nothing():
    bridge = EventBridge(asyncio.get_running_loop())
    streams = [EventStream() for _ in range(8)]
    emits = [bridge.deliver_to(stream) for stream in streams]

    def step_thread():
        for token in range(500):
            for emit in emits:
                emit(Delta(f"{token} ", (token,)))
        for emit in emits:
            emit(END)

    thread = threading.Thread(target=step_thread)
    thread.start()

    async def read(stream):
        tokens: list[int] = []
        async for event in stream:
            if isinstance(event, Delta):
                tokens += event.token_ids
        return tokens

    assert await asyncio.gather(*map(read, streams)) == [list(range(500))] * 8
    thread.join()


async def test_whole_output_is_one_delta():
    stream = EventStream()
    reader = asyncio.ensure_future(stream.whole())
    await asyncio.sleep(0)
    stream.push(Delta("a", (1,)))
    await asyncio.sleep(0)
    stream.push(Delta("b", (2,)))
    stream.push(END)
    assert await reader == (Delta("ab", (1, 2)), END)


async def test_whole_output_of_a_failure_is_its_error():
    stream = EventStream()
    stream.push(Delta("a", (1,)))
    stream.push(Failed(DeadlineError("too late")))
    with pytest.raises(DeadlineError, match="too late"):
        await stream.whole()


class HeldTimers:
    """The running loop, but for its timers, which the test lets off."""

    def __init__(self):
        self.call_soon_threadsafe = asyncio.get_running_loop().call_soon_threadsafe
        self.timers = []

    def call_later(self, delay_s, callback):
        self.timers.append((delay_s, callback))


async def test_tokens_are_joined_while_the_loop_has_had_its_share_and_first_ones_do_not_wait():
    loop = HeldTimers()
    # Any time spent is too much: each pause is as long as may be.
    bridge = EventBridge(loop, share=1e-9, max_pause_s=0.2)
    early, late = EventStream(), EventStream()
    emit_early, emit_late = bridge.deliver_to(early), bridge.deliver_to(late)
    seen: list[tuple[str, object]] = []

    async def read(name, stream):
        async for event in stream:
            seen.append((name, event))

    readers = [asyncio.ensure_future(read("early", early)), asyncio.ensure_future(read("late", late))]
    emit_early(Delta("a", (1,)))
    await wait_for(lambda: len(seen) == 1)
    emit_early(Delta("b", (2,)))
    await wait_for(lambda: loop.timers)
    emit_early(Delta("c", (3,)))
    emit_late(Delta("x", (9,)))
    await wait_for(lambda: len(seen) == 2)
    assert [name for name, _ in seen] == ["early", "late"]  # before what was emitted earlier and waits
    emit_early(END)
    emit_late(END)
    [(delay_s, hand_out)] = loop.timers
    assert delay_s == 0.2
    hand_out()
    await asyncio.gather(*readers)
    assert [event for name, event in seen if name == "early"] == [Delta("a", (1,)), Delta("bc", (2, 3)), END]
    assert [event for name, event in seen if name == "late"] == [Delta("x", (9,)), END]


async def test_summary_tells_counts_and_never_text():
    stream = EventStream()
    assert stream.summary(0.0) == {"output_tokens": 0}
    stream.push(Delta("secret", (1, 2)))
    stream.push(END)
    summary = stream.summary(0.0)
    assert summary["ttft_s"] > 0
    assert {name: summary[name] for name in ("output_tokens", "finish_reason", "cached_tokens")} == {
        "output_tokens": 2,
        "finish_reason": "length",
        "cached_tokens": 0,
    }
    assert "secret" not in str(summary)
    scored = EventStream(is_scored=True)
    scored.push(Delta("", (1, 2)))
    assert scored.summary(0.0) == {"scored_tokens": 2}
