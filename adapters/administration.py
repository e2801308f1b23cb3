"""What operators do to loaded adapters: unload, roll back, alias. Thread-safe; calls may block."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import structlog

from .aliases import MAX_TARGETS
from .core import ManagerCore
from .errors import (
    AdapterDigestError,
    AdapterExistsError,
    AdapterIdError,
    AdapterNotFoundError,
    AdapterNoVersionError,
)
from .info import AdapterInfo, AliasInfo, AliasTarget, LoadOptions
from .loading import AdapterLoads
from .lookup import find_current, not_found
from .paths import check_adapter_id
from .publishing import Intent
from .record import Record
from .reference import parse_reference
from .rules import check_room, check_unload
from .source_reader import StoredSource
from .state.database import SavedAdapter, SavedAlias

_log = structlog.get_logger(__name__)


class AdapterAdministration:
    """See the module.

    Args:
        core: registry, locks and state.
        loads: brings versions back from their kept files.
    """

    def __init__(self, core: ManagerCore, loads: AdapterLoads) -> None:
        self._core = core
        self._loads = loads

    def unload(self, adapter_id: str) -> None:
        """Forget an id; see AdapterManager."""
        check_adapter_id(adapter_id)
        core = self._core
        with core.admin:
            with core.changed:
                check_unload(core.registry, adapter_id)
            saved = core.state.database.get(adapter_id)
            if saved is not None and saved.folder_digest and self._loads.has_folder(adapter_id):
                # The folder is still there, and found again at the next start: remember that it is not wanted.
                previous = saved.digest or saved.previous
                core.state.database.save(dataclasses.replace(saved, digest="", by_call=False, previous=previous))
            else:
                core.state.database.delete(adapter_id)
            with core.changed:
                core.registry.unload(adapter_id, core.drain_until())
                core.changed.notify_all()
        _log.info("adapter_unloaded", adapter=adapter_id)

    def folder_gone(self, adapter_id: str, directory: Path) -> None:
        """The watched folder of an id is gone; see AdapterManager."""
        core = self._core
        with core.admin:
            saved = core.state.database.get(adapter_id)
            with core.changed:
                registry = core.registry
                registry.loading.forget_folder(adapter_id)
                record = registry.current.get(adapter_id)
                known = record is not None or adapter_id in registry.loading or adapter_id in registry.failed
                is_held = adapter_id in registry.pins or bool(registry.aliases.names_of_adapter(adapter_id))
            is_own = record is not None and _is_from(record, saved, directory)
            if saved is not None and saved.by_call and record is not None and not is_own:
                core.state.database.save(dataclasses.replace(saved, folder_digest=""))
                return
            if record is not None and is_held:
                if saved is not None:
                    core.state.database.save(dataclasses.replace(saved, by_call=True, folder_digest=""))
                _log.warning("adapter_folder_gone", adapter=adapter_id, why_kept="it is pinned or aliased")
                return
            core.state.database.delete(adapter_id)
            with core.changed:
                registry.pin(adapter_id, None)  # of one that failed, so that a later folder of its name does not get it
            if not known or (record is not None and not is_own):
                return
            with core.changed:
                registry.unload(adapter_id, core.drain_until())
                core.changed.notify_all()
        _log.info("adapter_unloaded", adapter=adapter_id, why="its folder is gone")

    def rollback(self, adapter_id: str, digest_prefix: str) -> AdapterInfo:
        """Make an earlier version current again; see AdapterManager."""
        reference = parse_reference(f"{adapter_id}@{digest_prefix}" if digest_prefix else adapter_id)
        digest = self._earlier(adapter_id, reference.digest_prefix)
        options = LoadOptions(allow_zero=True, allow_other_base=True, expected_digest=digest)
        intent = Intent(by_call=True, is_folder=False, source="", options=options)
        info = self._loads.start_from(adapter_id, StoredSource(digest), intent).result()
        _log.info("adapter_rolled_back", adapter=adapter_id, digest=digest)
        return info

    def set_alias(self, name: str, targets: Sequence[tuple[str, float]]) -> AliasInfo:
        """Create or move an alias; see AdapterManager."""
        check_adapter_id(name)
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise AdapterIdError(f"Alias {name!r} has {len(targets)} targets; allowed: 1 to {MAX_TARGETS}.")
        held: list[Record] = []
        try:
            for text, _ in targets:
                held.append(self._hold_target(text))
            alias = _alias(name, held, [weight for _, weight in targets])
            self._set(alias, held)
        finally:
            with self._core.changed:
                for record in held:
                    self._core.registry.drop_candidate(record, self._core.drain_until())
                self._core.changed.notify_all()
        _log.info("alias_set", alias=name, targets=[f"{t.adapter_id}@{t.digest[:12]}" for t in alias.targets])
        return alias

    def delete_alias(self, name: str) -> None:
        """Make an alias unknown; see AdapterManager."""
        check_adapter_id(name)
        core = self._core
        with core.admin:
            with core.changed:
                if name not in core.registry.aliases:
                    raise AdapterNotFoundError(f"There is no alias {name!r}; see ListAliases.", {"alias": name})
            core.state.database.delete_alias(name)
            with core.changed:
                core.registry.delete_alias(name, core.drain_until())
                core.changed.notify_all()
        _log.info("alias_deleted", alias=name)

    def _set(self, alias: AliasInfo, targets: Sequence[Record]) -> None:
        core = self._core
        for record in targets:
            self._loads.keep(record)
        with core.admin:
            saved = core.state.database.get(alias.name)
            with core.changed:
                registry = core.registry
                if (saved and saved.digest) or alias.name in registry.by_id or alias.name in registry.loading:
                    raise AdapterExistsError(
                        f"There is an adapter {alias.name!r}; an alias cannot have the same name.",
                        {"alias": alias.name},
                    )
                self._check_targets(targets)
            core.state.database.save_alias(SavedAlias(alias.name, alias.targets))
            with core.changed:
                registry.set_alias(alias, core.drain_until())
                core.changed.notify_all()

    def _check_targets(self, targets: Sequence[Record]) -> None:
        for record in targets:
            if record.error is not None:
                raise type(record.error)(record.error.message, record.error.metadata)
            check_room(self._core.registry, record, record.pinned)

    def _hold_target(self, text: str) -> Record:
        """The version that an alias shall lead to, from its kept files if need be; ends with drop_candidate."""
        reference = parse_reference(text)
        with self._core.changed:
            if reference.name in self._core.registry.aliases:
                raise AdapterIdError(f"{reference.name!r} is an alias; an alias leads to adapters, not to aliases.")
            record = None if reference.digest_prefix else find_current(self._core.registry, reference.name)
        digest = record.version.digest if record else self._matching(reference.name, reference.digest_prefix)
        return self._loads.hold_stored(reference.name, digest)

    def _earlier(self, adapter_id: str, digest_prefix: str) -> str:
        """The digest to go back to."""
        if digest_prefix:
            return self._matching(adapter_id, digest_prefix)
        saved = self._core.state.database.get(adapter_id)
        if saved is None or not (saved.digest or saved.previous):
            with self._core.changed:
                find_current(self._core.registry, adapter_id)
        if saved is None or not saved.previous:
            raise AdapterNoVersionError(
                f"Adapter {adapter_id!r} has had one version only; there is none to go back to.",
                {"adapter_id": adapter_id},
            )
        return saved.previous

    def _matching(self, adapter_id: str, digest_prefix: str) -> str:
        """The one digest, among those that the id is known to have had, that begins so."""
        saved = self._core.state.database.get(adapter_id)
        with self._core.changed:
            digests = set(self._core.registry.by_id.get(adapter_id, ()))
            digests |= {
                target.digest
                for alias in self._core.registry.aliases.all()
                for target in alias.targets
                if target.adapter_id == adapter_id
            }
        digests |= {saved.previous, saved.digest} - {""} if saved is not None else set()
        if not digests:
            raise not_found(adapter_id)
        found = sorted(digest for digest in digests if digest.startswith(digest_prefix))
        if len(found) > 1:
            raise AdapterDigestError(
                f"{adapter_id}@{digest_prefix} fits several versions ({', '.join(d[:12] for d in found)}); give more "
                "digits of the one that is meant.",
                {"adapter_id": adapter_id},
            )
        if not found:
            raise AdapterNoVersionError(
                f"Adapter {adapter_id!r} has no version {digest_prefix}; known are "
                f"{', '.join(sorted(d[:12] for d in digests))}.",
                {"adapter_id": adapter_id},
            )
        return found[0]


def _alias(name: str, records: Sequence[Record], weights: Sequence[float]) -> AliasInfo:
    """The alias of checked targets.

    Raises:
        AdapterDigestError: a target twice, or a weight that is none.
    """
    targets: list[AliasTarget] = []
    for record, weight in zip(records, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise AdapterDigestError(f"A target of alias {name!r} has weight {weight}; allowed: numbers above 0.")
        target = AliasTarget(record.version.adapter_id, record.version.digest, weight)
        if any((t.adapter_id, t.digest) == (target.adapter_id, target.digest) for t in targets):
            raise AdapterDigestError(f"Alias {name!r} names {record.version} twice; give each version one weight.")
        targets.append(target)
    return AliasInfo(name, tuple(targets))


def _is_from(record: Record, saved: SavedAdapter | None, directory: Path) -> bool:
    """Whether a version was loaded from a watched folder; after a restart it may have come from its kept files."""
    if saved is not None and not saved.source and saved.folder_digest == saved.digest == record.version.digest:
        return True
    return record.origin.directory == directory
