"""After a restart: what was loaded by call, pinned and aliased is so again."""

from concurrent.futures import Future, wait
from pathlib import Path

import structlog

from .core import ManagerCore
from .errors import ServingError
from .info import AdapterInfo, AliasInfo, LoadOptions
from .loading import AdapterLoads
from .publishing import Intent, saved_pin
from .source_reader import Source, StoredSource
from .sources.locate import SourcePolicy, locate
from .state.database import SavedAdapter

_log = structlog.get_logger(__name__)


def restore_names(core: ManagerCore) -> None:
    """Put pins and aliases back, before anything is loaded: they apply to versions as these come."""
    saved = core.state.database.load()
    with core.changed:
        for adapter in saved.adapters:
            if adapter.pinned:
                core.registry.pin(adapter.adapter_id, saved_pin(adapter))
        for alias in saved.aliases:
            core.registry.set_alias(AliasInfo(alias.name, alias.targets), core.drain_until())
    targets = {target.digest for alias in saved.aliases for target in alias.targets}
    core.reserved = frozenset(targets | {adapter.digest for adapter in saved.adapters if adapter.by_call})


def restore_called(core: ManagerCore, loads: AdapterLoads, sources: SourcePolicy) -> None:
    """Load what calls had loaded, and wait for it. What cannot be loaded is listed as failed, with the reason."""
    futures: list[Future[AdapterInfo]] = []
    for adapter in core.state.database.load().adapters:
        if not adapter.by_call or not adapter.digest:
            continue
        options = LoadOptions(adapter.allow_zero, adapter.allow_other_base, adapter.digest)
        intent = Intent(by_call=True, is_folder=False, source=adapter.source, options=options)
        try:
            futures.append(loads.start_from(adapter.adapter_id, _source(core, sources, adapter), intent))
        except ServingError as error:
            _log.warning("adapter_not_restored", adapter=adapter.adapter_id, message=error.message)
            with core.changed:
                ticket = core.registry.loading.begin(adapter.adapter_id)
            core.fail_load(adapter.adapter_id, ticket, error)
    wait(futures)


def restore_targets(core: ManagerCore, loads: AdapterLoads, roots: tuple[Path, ...]) -> None:
    """Bring back versions that only aliases name, and forget folders that went while no server ran.

    To be called when the folders have been loaded.
    """
    with core.changed:
        aliases = core.registry.aliases.all()
    for alias in aliases:
        for target in alias.targets:
            try:
                record = loads.hold_stored(target.adapter_id, target.digest)
            except ServingError as error:
                _log.warning("alias_target_not_restored", alias=alias.name, message=error.message)
                continue
            with core.changed:
                core.registry.drop_candidate(record, core.drain_until())
    if not all(root.is_dir() for root in roots):
        return  # an unmounted volume is not the wish to forget every adapter
    for adapter in core.state.database.load().adapters:
        with core.admin:
            has_folder = any((root / adapter.adapter_id).is_dir() for root in roots)
            with core.changed:
                known = adapter.adapter_id in core.registry.current or adapter.adapter_id in core.registry.failed
            if not adapter.by_call and not has_folder and not known:
                core.state.database.delete(adapter.adapter_id)
                with core.changed:
                    core.registry.pin(adapter.adapter_id, None)


def _source(core: ManagerCore, sources: SourcePolicy, adapter: SavedAdapter) -> Source:
    if core.state.store.get(adapter.digest) is not None:
        return StoredSource(adapter.digest)
    return locate(sources, adapter.adapter_id, adapter.source or None)
