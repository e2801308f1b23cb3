"""Clients that ask for random adapters and check every answer against the version that gave it."""

import itertools
import queue
import time
from dataclasses import dataclass
from typing import Final

from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.engine.request import Delta, Event, Failed, Finished, Request
from lorikeet.server.engine.sampling_params import SamplingParams

from .actor import Actor
from .references import MAX_TOKENS
from .world import World

MAX_IN_FLIGHT: Final = 5


@dataclass(slots=True)
class Ticket:
    """One accepted request, as its client sees it. `emit` is called on the step thread.

    Attributes:
        world: is told of events that may not be.
        prompt: index of it.
        version: that was resolved; None: the base.
        ended: gets the ticket after its terminal event.
        request_id: of the request.
        deadline: `time.monotonic()` second, or None.
        deaf_after: deltas after which the client is gone: taking another one fails. None: never.
        asked_at: `time.monotonic()` before it was handed in.
        is_cancelled: whether the client cancelled it.
        tokens: received so far.
        end: the terminal event.
    """

    world: World
    prompt: int
    version: AdapterVersion | None
    ended: "queue.SimpleQueue[Ticket]"
    request_id: str
    deadline: float | None
    deaf_after: int | None
    asked_at: float
    is_cancelled: bool = False
    tokens: list[int] | None = None
    end: Finished | Failed | None = None

    def emit(self, event: Event) -> None:
        """What the engine calls."""
        if self.end is not None:
            self.world.report(f"{self.request_id} got {event} after its end, {self.end}")
            return
        if isinstance(event, Delta):
            self.tokens = [*(self.tokens or []), *event.token_ids]
            if self.deaf_after is not None and len(self.tokens) > self.deaf_after:
                raise ConnectionError("the client is gone (injected)")
            return
        self.end = event
        self.world.add_live(-1)
        self.ended.put(self)


class Requester(Actor):
    """Asks, cancels, goes away, and checks what comes back.

    Args:
        world, name, seed, pause_s: see Actor.
        names: ids and aliases that it may ask for, beside those in the ledger.
    """

    def __init__(self, world: World, name: str, seed: int, pause_s: float, names: list[str]) -> None:
        super().__init__(world, name, seed, pause_s)
        self._names = names
        self._live: dict[str, Ticket] = {}
        self._ended: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._numbers = itertools.count()

    def act(self) -> None:
        """One operation."""
        self.check_ended()
        if self._live and self.rng.random() < 0.05:
            self._cancel(self.rng.choice(sorted(self._live)))
        elif len(self._live) < MAX_IN_FLIGHT:
            self._ask()

    def check_ended(self) -> None:
        """Check every answer that is complete."""
        while not self._ended.empty():
            ticket = self._ended.get()
            del self._live[ticket.request_id]
            self._check(ticket)

    def _cancel(self, request_id: str) -> None:
        self.world.count("cancel")
        self._live[request_id].is_cancelled = True
        self.world.app.engine.abort(request_id)

    def _ask(self) -> None:
        rng = self.rng
        version = self._resolve() if rng.random() < 0.95 else None
        if isinstance(version, ServingError):
            return
        prompt = rng.randrange(len(self.world.references.prompts))
        ticket = Ticket(
            self.world,
            prompt,
            version,
            self._ended,
            f"{self.name}-{next(self._numbers)}",
            deadline=time.monotonic() + rng.uniform(0.0, 0.5) if rng.random() < 0.1 else None,
            deaf_after=rng.randrange(8) if rng.random() < 0.03 else None,
            asked_at=time.monotonic(),
        )
        params = SamplingParams(
            temperature=0.0, max_tokens=max(1, min(MAX_TOKENS, int(rng.expovariate(1 / 16)))), ignore_eos=True
        )
        tokens = self.world.references.prompts[prompt]
        if rng.random() < 0.01:
            tokens = tokens * 1000
        adaptation = Adaptation.single(version) if version is not None else None
        request = Request(ticket.request_id, list(tokens), params, adaptation, ticket.emit, deadline=ticket.deadline)
        self._live[ticket.request_id] = ticket
        self.world.add_live(1)
        self.world.count("request")
        try:
            self.world.app.engine.submit(request)
        except ServingError as error:
            self.world.add_live(-1)
            del self._live[ticket.request_id]
            if version is not None:
                self.world.app.manager.release(version)
            too_long = len(tokens) > 1000
            allowed = {"PROMPT_TOO_LONG"} if too_long else {"QUEUE_FULL"}
            self.world.check_reason("request", error.reason, error.message, allowed)

    def _resolve(self) -> AdapterVersion | ServingError:
        """Hold a version of a random name, and check that it is one that the name may lead to now."""
        ledger, rng = self.world.ledger, self.rng
        owned = ledger.names()
        name = rng.choice([*owned, *owned, *self._names])
        before, prefix = ledger[name], ""
        if rng.random() < 0.15:
            likely = [digest for digest in (before.digests if before is not None else ()) if digest]
            digest = rng.choice(likely or [content.digest for content in self.world.contents])
            prefix = digest[: rng.randint(6, 64)]
        reference = f"{name}@{prefix}" if prefix else name
        self.world.count("resolve")
        try:
            version = self.world.app.manager.resolve(reference, rng.choice(["", "sticky"]))
        except ServingError as error:
            self._check_refusal(name, prefix, before, error)
            return error
        if not version.digest.startswith(prefix):
            self.world.report(f"{reference} was resolved to {version}")
        if version.digest not in self.world.by_digest:
            self.world.report(f"{reference} was resolved to {version}, a content that never was")
        if before is not None and not prefix and before == ledger[name] and version.digest not in before.digests:
            self.world.report(f"{reference} was resolved to {version}; at that time it led to {before.digests}")
        return version

    def _check_refusal(self, name: str, prefix: str, before, error: ServingError) -> None:
        allowed = {"ADAPTER_NOT_FOUND"}
        if prefix:
            allowed.add("ADAPTER_ID_INVALID")  # of an alias
        self.world.check_reason("resolve", error.reason, error.message, allowed)
        is_sure = before is not None and not prefix and before == self.world.ledger[name]
        if is_sure and None not in before.digests and not self._may_be_lost(name, error):
            self.world.report(f"{name} was not found ({error.message}); at that time it led to {before.digests}")

    def _may_be_lost(self, name: str, error: ServingError) -> bool:
        if error.message.startswith("Alias "):  # which does not say whose version was lost
            return bool(self.world.logs.lost or self.world.logs.forsaken) and "could not be loaded" in error.message
        # A request hears of a failed read before the log does.
        is_lost = self.world.was_lost(name) or self.world.faults.happened_since("read", time.monotonic())
        return is_lost and ("failed to load" in error.message or "being loaded" in error.message)

    def _check(self, ticket: Ticket) -> None:
        digest = ticket.version.digest if ticket.version is not None else ""
        tokens = ticket.tokens or []
        if tokens:
            problem = self.world.references.mismatch(digest, ticket.prompt, tokens)
            if problem is not None:
                self.world.report(f"{ticket.request_id} on {ticket.version}: {problem}")
        if isinstance(ticket.end, Finished):
            self.world.count("answer")
            if ticket.end.output_tokens != len(tokens):
                self.world.report(f"{ticket.request_id} got {len(tokens)} of {ticket.end.output_tokens} tokens")
        elif isinstance(ticket.end, Failed):
            error = ticket.end.error
            self.world.check_reason("answer", error.reason, error.message, self._allowed(ticket))

    def _allowed(self, ticket: Ticket) -> set[str]:
        """Reasons for which it may have failed."""
        allowed = set[str]()
        if ticket.is_cancelled or ticket.deaf_after is not None:
            allowed.add("CANCELLED")
        if ticket.deadline is not None:
            allowed.add("DEADLINE_EXCEEDED")
        if ticket.version is None:
            return allowed
        if self.world.faults.happened_since("device", ticket.asked_at):
            allowed.add("ADAPTER_MEMORY")
        if self.world.faults.happened_since("read", ticket.asked_at) or not self._is_live(ticket.version):
            allowed.add("ADAPTER_UNLOADED")
        return allowed

    def _is_live(self, version: AdapterVersion) -> bool:
        """Whether the version is one that requests may still be on: one that was dropped by force never is again."""
        core = self.world.app.manager._core
        with core.changed:
            record = core.registry.records.get(version)
            return record is not None and record.error is None
