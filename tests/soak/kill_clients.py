"""Clients of a server process that is killed under them."""

import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError

from .contents import Content, place
from .kill_model import Knowledge, Known, Target, observe
from .references import MAX_TOKENS, References

CALL_TIMEOUT_S: Final = 60.0


class KillTally:
    """What all clients did and found. Thread-safe."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        """One more."""
        with self._lock:
            self.counts[what] += 1

    def report(self, problem: str) -> None:
        """Something is wrong."""
        with self._lock:
            self.problems.append(problem)


class Manager:
    """Changes its own ids and aliases one call at a time, until the server is gone, and knows what must be so then.

    Args:
        root: the server's adapter directory; contents are in its hidden folder `.staged`.
        contents: to load.
        ids, aliases: nobody else touches these.
        folders: those of the ids that have a watched folder: id -> its content.
        seed: of what it does.
        tally: of what happens.

    Attributes:
        acknowledged: what the server has said to have done.
        pending: what it would be after the call that was under way when the server was killed; else the same.
    """

    def __init__(
        self,
        root: Path,
        contents: list[Content],
        *,
        ids: list[str],
        aliases: list[str],
        folders: dict[str, Content],
        seed: str,
        tally: KillTally,
    ) -> None:
        self._root, self._contents = root, contents
        self._ids, self._alias_names, self._folders = ids, aliases, folders
        self._rng = random.Random(seed)
        self._tally = tally
        first = {i: Known(current=folders[i].digest) if i in folders else Known() for i in ids}
        self.acknowledged = self.pending = Knowledge(first, {})

    @property
    def names(self) -> list[str]:
        """Everything that requests can name."""
        return [*self._ids, *self._alias_names]

    def check(self, client: LorikeetClient) -> None:
        """After a start: what was acknowledged is so, and what was not is so as a whole or not at all."""
        seen = observe(client, self._ids, self._alias_names)
        if seen == self.pending.visible() and self.pending != self.acknowledged:
            self._tally.count("unacknowledged call had happened")
            self.acknowledged = self.pending
        if seen != self.acknowledged.visible():
            self._tally.report(f"after a restart: {seen}\nacknowledged: {self.acknowledged}\nor: {self.pending}")
        self.pending = self.acknowledged

    def work(self, address: str) -> None:
        """Until the server is gone."""
        try:
            with LorikeetClient(address, timeout_s=CALL_TIMEOUT_S) as client:
                while self._act(client):
                    pass
        except BaseException:
            self._tally.report(traceback.format_exc())

    def _act(self, client: LorikeetClient) -> bool:
        operations = (
            (self._load, 10),
            (self._load_moving, 4),
            (self._unload, 4),
            (self._roll_back, 6),
            (self._pin, 4),
            (self._unpin, 4),
            (self._set_alias, 6),
            (self._delete_alias, 3),
        )
        act = self._rng.choices([act for act, _ in operations], [weight for _, weight in operations])[0]
        adapter_id = self._rng.choice(self._ids)
        if not self.acknowledged.ids[adapter_id].current and self._rng.random() < 0.7:
            act = self._load
        return act(client, adapter_id)

    def _call(self, name: str, after: Knowledge | None, refusal: str, call: Callable[[], object]) -> bool:
        """Make a change; whether the server is still there.

        Args:
            name: of the operation.
            after: what the server knows when it has happened; None: it must be refused.
            refusal: the reason for which it must be, or may be, refused.
            call: makes it.
        """
        if after is not None:
            self.pending = after
        try:
            call()
        except RemoteError as error:
            if not error.reason and error.code == "UNAVAILABLE":
                self._tally.count(f"{name}: {error.code}, the server is gone")
                return False
            self._tally.count(f"{name}: {error.reason}")
            if error.reason != refusal:
                self._tally.report(f"{name} was refused: {error}; known was {self.acknowledged}")
            self.pending = self.acknowledged
            return True
        self._tally.count(name)
        if after is None:
            self._tally.report(f"{name} was not refused with {refusal}; known was {self.acknowledged}")
        self.acknowledged = self.pending
        return True

    def _load(self, client: LorikeetClient, adapter_id: str) -> bool:
        content = self._rng.choice(self._contents)
        return self._load_from(client, adapter_id, content, f".staged/{content.name}")

    def _load_moving(self, client: LorikeetClient, adapter_id: str) -> bool:
        """From a folder whose content is another one the next time, so that only the server's own copy is left."""
        content = self._rng.choice(self._contents)
        place(content, self._root / f".moving-{adapter_id}")
        return self._load_from(client, adapter_id, content, f".moving-{adapter_id}")

    def _load_from(self, client: LorikeetClient, adapter_id: str, content: Content, path: str) -> bool:
        known = self.acknowledged.ids[adapter_id].with_current(content.digest)
        after = self.acknowledged.with_id(adapter_id, known)
        return self._call(
            "load", after, "", lambda: client.load_adapter(adapter_id, path, expected_version=content.digest)
        )

    def _unload(self, client: LorikeetClient, adapter_id: str) -> bool:
        known = self.acknowledged.ids[adapter_id]
        after: Knowledge | None = None
        if not known.current:
            refusal = "ADAPTER_NOT_FOUND"
        elif known.pinned or self.acknowledged.is_aliased(adapter_id):
            refusal = "ADAPTER_IN_USE"
        else:
            refusal = ""
            after = self.acknowledged.with_id(adapter_id, known.unloaded(has_folder=adapter_id in self._folders))
        return self._call("unload", after, refusal, lambda: client.unload_adapter(adapter_id))

    def _roll_back(self, client: LorikeetClient, adapter_id: str) -> bool:
        known = self.acknowledged.ids[adapter_id]
        if known.previous:
            after = self.acknowledged.with_id(adapter_id, known.with_current(known.previous))
            return self._call("rollback", after, "", lambda: self._rolled_back(client, adapter_id, known.previous))
        refusal = "ADAPTER_NO_VERSION" if known.current else "ADAPTER_NOT_FOUND"
        return self._call("rollback", None, refusal, lambda: client.rollback_adapter(adapter_id))

    def _rolled_back(self, client: LorikeetClient, adapter_id: str, digest: str) -> None:
        version = client.rollback_adapter(adapter_id).version
        if version != digest:
            self._tally.report(f"{adapter_id} was rolled back to {version}; the version before was {digest}")

    def _pin(self, client: LorikeetClient, adapter_id: str) -> bool:
        known, tier = self.acknowledged.ids[adapter_id], self._rng.choice(("host", "device"))
        if not known.current:
            return self._call("pin", None, "ADAPTER_NOT_FOUND", lambda: client.pin_adapter(adapter_id))
        after = self.acknowledged.with_id(adapter_id, Known(known.current, tier, known.previous))
        return self._call("pin", after, "", lambda: client.pin_adapter(adapter_id, tier))

    def _unpin(self, client: LorikeetClient, adapter_id: str) -> bool:
        known = self.acknowledged.ids[adapter_id]
        if not known.current:
            return self._call("unpin", None, "ADAPTER_NOT_FOUND", lambda: client.unpin_adapter(adapter_id))
        after = self.acknowledged.with_id(adapter_id, Known(known.current, "", known.previous))
        return self._call("unpin", after, "", lambda: client.unpin_adapter(adapter_id))

    def _set_alias(self, client: LorikeetClient, _: str) -> bool:
        """To one or two versions, current or earlier ones."""
        name = self._rng.choice(self._alias_names)
        targets: list[Target] = []
        for adapter_id in self._rng.sample(self._ids, self._rng.choice((1, 2))):
            known = self.acknowledged.ids[adapter_id]
            digest = self._rng.choice((known.current, known.previous)) or known.current
            if not digest:
                references = {adapter_id: 1.0}
                return self._call("alias", None, "ADAPTER_NOT_FOUND", lambda: client.set_alias(name, references))  # noqa: B023
            targets.append(Target(adapter_id, digest, self._rng.choice((1.0, 2.5))))
        after = self.acknowledged.with_alias(name, tuple(targets))
        wanted = {f"{target.adapter_id}@{target.digest}": target.weight for target in targets}
        return self._call("alias", after, "", lambda: client.set_alias(name, wanted))

    def _delete_alias(self, client: LorikeetClient, _: str) -> bool:
        name = self._rng.choice(self._alias_names)
        after = self.acknowledged.with_alias(name, None) if name in self.acknowledged.aliases else None
        refusal = "" if after is not None else "ADAPTER_NOT_FOUND"
        return self._call("alias deleted", after, refusal, lambda: client.delete_alias(name))


class Asker:
    """Asks for random names until the server is gone, and checks every answer against the version that gave it.

    Args:
        names: ids and aliases.
        references: answers.
        seed, tally: as for Manager.
    """

    def __init__(self, names: list[str], references: References, seed: str, tally: KillTally) -> None:
        self._names, self._references = names, references
        self._rng = random.Random(seed)
        self._tally = tally

    def work(self, address: str) -> None:
        """Until the server is gone."""
        try:
            with LorikeetClient(address, timeout_s=CALL_TIMEOUT_S) as client:
                while self._ask(client):
                    pass
        except BaseException:
            self._tally.report(traceback.format_exc())

    def _ask(self, client: LorikeetClient) -> bool:
        prompt = self._rng.randrange(len(self._references.prompts))
        try:
            answer = client.generate(
                token_ids=self._references.prompts[prompt],
                adapter_id=self._rng.choice(["", *self._names]),
                max_tokens=self._rng.randint(1, MAX_TOKENS),
                temperature=0.0,
                ignore_eos=True,
            )
        except RemoteError as error:
            self._tally.count(f"request: {error.reason or error.code}")
            if error.code != "UNAVAILABLE" and error.reason != "ADAPTER_NOT_FOUND":
                self._tally.report(f"a request ended with {error}")
            return error.code != "UNAVAILABLE"
        self._tally.count("request")
        problem = self._references.mismatch(answer.adapter.version, prompt, list(answer.token_ids))
        if problem is not None:
            self._tally.report(f"{answer.adapter}: {problem}")
        return True
