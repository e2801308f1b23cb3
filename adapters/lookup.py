"""Which version a reference means: an id, an alias or `id@digest-prefix`.

Imports no torch; called under the manager's lock.
"""

import secrets
from typing import TYPE_CHECKING

from .aliases import choose_target
from .errors import AdapterDigestError, AdapterIdError, AdapterNotFoundError
from .paths import check_adapter_id
from .record import Record

if TYPE_CHECKING:
    from .registry import Registry


def find_version(registry: "Registry", name: str, digest_prefix: str, routing_key: str) -> Record:
    """The version that a new request gets.

    Args:
        registry: all versions.
        name: well-formed id or alias.
        digest_prefix: lower-case hex, or empty.
        routing_key: decides among the targets of an alias; empty: one is drawn.

    Raises:
        AdapterNotFoundError: unknown, still loading, failed, or not served any more.
        AdapterDigestError: the prefix fits several versions.
        AdapterIdError: an alias with a digest prefix.
    """
    alias = registry.aliases.get(name)
    if alias is not None:
        if digest_prefix:
            raise AdapterIdError(f"{name!r} is an alias; a version is named by its adapter's id: `id@{digest_prefix}`.")
        target = choose_target(alias, routing_key or secrets.token_hex(8))
        record = registry.by_id.get(target.adapter_id, {}).get(target.digest)
        if record is None or not record.is_servable:
            raise AdapterNotFoundError(
                f"Alias {name!r} leads to {target.adapter_id}@{target.digest[:12]}, which could not be loaded; load it "
                "again, or move the alias.",
                {"alias": name},
            )
        return record
    if digest_prefix:
        return _find_by_digest(registry, name, digest_prefix)
    record = registry.current.get(name)
    if record is None:
        if name in registry.loading:
            raise AdapterNotFoundError(f"Adapter {name!r} is still being loaded; try again.")
        if name in registry.failed:
            raise AdapterNotFoundError(f"Adapter {name!r} failed to load: {registry.failed[name].message}")
        raise not_found(name)
    return record


def find_current(registry: "Registry", adapter_id: str) -> Record:
    """The current version of an id.

    Raises:
        AdapterIdError: malformed, or an alias.
        AdapterNotFoundError: see find_version.
    """
    check_adapter_id(adapter_id)
    if adapter_id in registry.aliases:
        raise AdapterIdError(f"{adapter_id!r} is an alias; this call takes an adapter's id.", {"alias": adapter_id})
    return find_version(registry, adapter_id, "", "")


def matching(records: list[Record], name: str, digest_prefix: str) -> Record | None:
    """The one record whose digest begins so, or None.

    Raises:
        AdapterDigestError: there are several.
    """
    found = [record for record in records if record.version.digest.startswith(digest_prefix)]
    if len(found) > 1:
        digests = ", ".join(sorted(record.version.digest[:12] for record in found))
        raise AdapterDigestError(
            f"{name}@{digest_prefix} fits several versions ({digests}); give more digits of the one that is meant.",
            {"adapter_id": name},
        )
    return found[0] if found else None


def not_found(name: str) -> AdapterNotFoundError:
    """The error for a name of which nothing is known."""
    return AdapterNotFoundError(
        f"Adapter {name[:128]!r} is not known to this server; load it, or see ListAdapters for those it has."
    )


def _find_by_digest(registry: "Registry", name: str, digest_prefix: str) -> Record:
    known = list(registry.by_id.get(name, {}).values())
    record = matching([r for r in known if r.is_servable], name, digest_prefix)
    if record is not None:
        return record
    if not known:
        raise not_found(name)
    served = ", ".join(sorted(r.version.digest[:12] for r in known if r.is_servable)) or "none"
    raise AdapterNotFoundError(
        f"Adapter {name!r} has no version {digest_prefix} that requests can use (it has {served}). RollbackAdapter or "
        "SetAlias bring back one that was replaced.",
        {"adapter_id": name},
    )
