"""An adapter manager that keeps lists, writes down what it was asked, and fails or blocks when it is told to."""

import dataclasses
import threading
from dataclasses import dataclass, field

from lorikeet.adapters.errors import AdapterNotFoundError, ServingError
from lorikeet.adapters.info import (
    AdapterDetails,
    AdapterInfo,
    AdapterState,
    AliasInfo,
    AliasTarget,
    Eviction,
    LoadOptions,
    LoadPlan,
    Tier,
)
from lorikeet.adapters.reference import parse_reference
from lorikeet.adapters.scaling import Scaling
from lorikeet.adapters.version import AdapterVersion

KJV = AdapterInfo(
    adapter_id="kjv", digest="d" * 64, state=AdapterState.READY, tier=Tier.DEVICE, bytes=12345, max_rank=8,
    slices={"v_proj": Scaling(8, 2.0), "q_proj": Scaling(4, 0.5)}, in_flight=3, error=None, warning="another base",
    loaded_at=1_700_000_000.25, source="kjv-folder", method="rsLoRA", current=True, pinned=Tier.HOST,
    aliases=("prod", "secret-alias"), proof="2 prompts replayed", trained_for="org/base", num_modules=14,
)  # fmt: skip
OLD_KJV = dataclasses.replace(
    KJV, digest="0" * 64, state=AdapterState.STORED, tier=Tier.DISK, current=False, pinned=None, aliases=(),
    in_flight=0, error="It was replaced.", proof="", warning=None,
)  # fmt: skip


@dataclass
class FakeManager:
    """See the module. `infos` are all versions; the first of an id is its current one.

    Attributes:
        calls: method and arguments of every call, in order.
        fail: raised by every call.
        gates: by method: calls of it block until the event is set.
        entered: released once for each call that came to its gate.
        held: versions that were resolved and not released.
    """

    infos: list[AdapterInfo] = field(default_factory=lambda: [KJV, OLD_KJV])
    aliases: dict[str, AliasInfo] = field(default_factory=dict)
    calls: list[tuple] = field(default_factory=list)
    fail: ServingError | None = None
    gates: dict[str, threading.Event] = field(default_factory=dict)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: set[str] = field(default_factory=set)
    held: list[AdapterVersion] = field(default_factory=list)

    def load(self, adapter_id, source=None, options=None):
        self._enter("load", adapter_id, source, options)
        info = dataclasses.replace(KJV, adapter_id=adapter_id, aliases=(), pinned=None)
        self.infos.append(info)
        return info

    def plan_load(self, adapter_id, source=None, options=LoadOptions()):  # noqa: B008  # frozen
        self._enter("plan_load", adapter_id, source, options)
        info = dataclasses.replace(KJV, adapter_id=adapter_id, state=AdapterState.STORED, aliases=(), pinned=None)
        evictions = (Eviction("devil", "e" * 64, Tier.DEVICE), Eviction("secret", "f" * 64, Tier.DEVICE))
        return LoadPlan(info, True, 2**20, 3 * 2**20, False, True, evictions)

    def unload(self, adapter_id):
        self._enter("unload", adapter_id)
        self.get(adapter_id)
        self.infos = [info for info in self.infos if info.adapter_id != adapter_id]

    def rollback(self, adapter_id, digest_prefix=""):
        self._enter("rollback", adapter_id, digest_prefix)
        return dataclasses.replace(OLD_KJV, adapter_id=adapter_id, state=AdapterState.READY, current=True)

    def prefetch(self, reference, tier, timeout_s):
        self._enter("prefetch", reference, tier, timeout_s)
        return dataclasses.replace(self.get(reference), tier=tier)

    def pin(self, adapter_id, tier, timeout_s):
        self._enter("pin", adapter_id, tier, timeout_s)
        return dataclasses.replace(self.get(adapter_id), pinned=tier)

    def unpin(self, adapter_id):
        self._enter("unpin", adapter_id)
        return dataclasses.replace(self.get(adapter_id), pinned=None)

    def set_alias(self, name, targets):
        self._enter("set_alias", name, targets)
        found = [(self.get(reference), weight) for reference, weight in targets]
        alias = AliasInfo(name, tuple(AliasTarget(info.adapter_id, info.digest, weight) for info, weight in found))
        self.aliases[name] = alias
        return alias

    def delete_alias(self, name):
        self._enter("delete_alias", name)
        if self.aliases.pop(name, None) is None:
            raise AdapterNotFoundError(f"There is no alias {name!r}.")

    def resolve(self, reference, routing_key=""):
        self._enter("resolve", reference)
        alias = self.aliases.get(reference)
        name, digest = (alias.targets[0].adapter_id, alias.targets[0].digest) if alias else (reference, "")
        info = self.get(name)
        self.held.append(version := AdapterVersion(info.adapter_id, digest or info.digest))
        return version

    def release(self, version):
        self.held.remove(version)

    def copy_files(self, version, target):
        self._enter("copy_files", version, target)
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text(version.digest)

    def list_aliases(self):
        self._enter("list_aliases")
        return list(self.aliases.values())

    def describe(self, reference):
        self._enter("describe", reference)
        info = self.get(reference)
        return AdapterDetails(info, tuple(other for other in self.infos if other.adapter_id == info.adapter_id))

    def list(self):
        self._enter("list")
        return list(self.infos)

    def get(self, reference):
        name, prefix = parse_reference(reference)
        for info in self.infos:
            if info.adapter_id == name and info.digest.startswith(prefix):
                return info
        raise AdapterNotFoundError(f"There is no adapter {name!r}.")

    def _enter(self, method, *arguments):
        self.calls.append((method, *arguments))
        self.threads.add(threading.current_thread().name)
        gate = self.gates.get(method)
        if gate is not None:
            self.entered.release()
            assert gate.wait(90)
        if self.fail is not None:
            raise self.fail
