"""`lorikeet adapters ...`, as far as it talks to a server."""

import argparse
import sys
from collections.abc import Callable, Iterator

from ..protos.v1 import adapters_pb2 as pb
from .cli_merges import run_merges
from .cli_print import DIGEST_DIGITS, as_dict, mebibytes, print_json, print_json_value, print_table
from .client import LoadOptions, LorikeetClient

_LIST_HEADER = ("ADAPTER", "STATE", "TIER", "PIN", "RANK", "SIZE", "IN FLIGHT", "VERSION", "ALIASES", "FOLDER")
_VERSION_HEADER = (
    "VERSION", "CURRENT", "STATE", "TIER", "PIN", "ALIASES", "IN FLIGHT", "SIZE", "RANK", "METHOD", "LOADED",
)  # fmt: skip
_ALIAS_HEADER = ("ALIAS", "SHARE", "WEIGHT", "ADAPTER", "VERSION")


def run_adapters(client: LorikeetClient, options: argparse.Namespace) -> int:
    """Run one of the commands.

    Returns:
        The exit status.
    """
    if options.adapters_command == "alias":
        _ALIAS_COMMANDS[options.alias_command](client, options)
    elif options.adapters_command == "merge":
        run_merges(client, options)
    else:
        _COMMANDS[options.adapters_command](client, options)
    return 0


def _list(client: LorikeetClient, options: argparse.Namespace) -> None:
    adapters = client.list_adapters()
    if options.json:
        print_json_value([as_dict(adapter) for adapter in adapters])
    elif adapters:
        print_table(_LIST_HEADER, (_list_row(adapter) for adapter in adapters), optional=("PIN", "ALIASES"))
    else:
        sys.stdout.write("no adapters\n")


def _get(client: LorikeetClient, options: argparse.Namespace) -> None:
    response = client.describe_adapter(options.adapter)
    if options.json:
        print_json(response)
        return
    _print_adapter(response.adapter)
    if response.versions:
        sys.stdout.write("\n")
        rows = (_version_row(version) for version in response.versions)
        print_table(_VERSION_HEADER, rows, optional=("PIN", "ALIASES"))
    for version in response.versions:
        if version.version != response.adapter.version:
            for name, text in _notes(version):
                sys.stdout.write(f"{version.version[:DIGEST_DIGITS]} {name}: {text}\n")
    _print_slices(response.adapter)


def _load(client: LorikeetClient, options: argparse.Namespace) -> None:
    fields: LoadOptions = {
        "source": options.source,
        "expected_version": options.expected_version,
        "allow_zero": options.allow_zero,
        "allow_other_base": options.allow_other_base,
    }
    if not options.dry_run:
        adapter = client.load_adapter(options.adapter, options.path, **fields)
        _show(adapter, options)
        if not options.json:
            _print_slices(adapter)
        return
    response = client.plan_load(options.adapter, options.path, **fields)
    if options.json:
        print_json(response)
    else:
        _print_plan(response.adapter, response.plan)


def _unload(client: LorikeetClient, options: argparse.Namespace) -> None:
    client.unload_adapter(options.adapter)
    sys.stdout.write(f"unloaded {options.adapter}\n")


def _set_alias(client: LorikeetClient, options: argparse.Namespace) -> None:
    alias = client.set_alias(options.name, options.targets)
    if options.json:
        print_json(alias)
    else:
        print_table(_ALIAS_HEADER, _alias_rows(alias))


def _delete_alias(client: LorikeetClient, options: argparse.Namespace) -> None:
    client.delete_alias(options.name)
    sys.stdout.write(f"deleted {options.name}\n")


def _list_aliases(client: LorikeetClient, options: argparse.Namespace) -> None:
    aliases = client.list_aliases()
    if options.json:
        print_json_value([as_dict(alias) for alias in aliases])
    elif aliases:
        print_table(_ALIAS_HEADER, (row for alias in aliases for row in _alias_rows(alias)))
    else:
        sys.stdout.write("no aliases\n")


_Command = Callable[[LorikeetClient, argparse.Namespace], None]

_COMMANDS: dict[str, _Command] = {
    "list": _list,
    "get": _get,
    "load": _load,
    "unload": _unload,
    "rollback": lambda client, options: _show(client.rollback_adapter(options.adapter, options.version), options),
    "prefetch": lambda client, options: _show(client.prefetch_adapter(options.adapter, options.tier), options),
    "pin": lambda client, options: _show(client.pin_adapter(options.adapter, options.tier), options),
    "unpin": lambda client, options: _show(client.unpin_adapter(options.adapter), options),
}
_ALIAS_COMMANDS: dict[str, _Command] = {"set": _set_alias, "delete": _delete_alias, "list": _list_aliases}


def _list_row(adapter: pb.Adapter) -> tuple[str, ...]:
    return (
        adapter.adapter_id,
        _state(adapter),
        _tier(adapter.tier),
        _tier(adapter.pinned_tier),
        _rank(adapter),
        _size(adapter),
        str(adapter.in_flight_requests),
        adapter.version[:DIGEST_DIGITS],
        ", ".join(adapter.aliases),
        adapter.source,
    )


def _version_row(adapter: pb.Adapter) -> tuple[str, ...]:
    return (
        adapter.version[:DIGEST_DIGITS],
        "yes" if adapter.current else "",
        _state(adapter),
        _tier(adapter.tier),
        _tier(adapter.pinned_tier),
        ", ".join(adapter.aliases),
        str(adapter.in_flight_requests),
        _size(adapter),
        _rank(adapter),
        adapter.method,
        _loaded(adapter),
    )


def _show(adapter: pb.Adapter, options: argparse.Namespace) -> None:
    """What a call has changed."""
    if options.json:
        print_json(adapter)
    else:
        _print_adapter(adapter)


def _print_adapter(adapter: pb.Adapter) -> None:
    _print_lines(
        {
            "adapter": adapter.adapter_id,
            "version": adapter.version,
            "state": _state(adapter),
            "tier": _tier(adapter.tier),
            "pinned": _tier(adapter.pinned_tier),
            "aliases": ", ".join(adapter.aliases),
            "in flight": str(adapter.in_flight_requests),
            **_content(adapter),
            "loaded": _loaded(adapter),
            **dict(_notes(adapter)),
        }
    )


def _content(adapter: pb.Adapter) -> dict[str, str]:
    """What is known of its files, loaded or not."""
    return {
        "size": _size(adapter),
        "rank": _rank(adapter),
        "modules": str(adapter.module_count or ""),
        "method": adapter.method,
        "base": adapter.trained_for,
        "folder": adapter.source,
    }


def _print_lines(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        if value:
            sys.stdout.write(f"{name:<10} {value}\n")


def _notes(adapter: pb.Adapter) -> Iterator[tuple[str, str]]:
    for name in ("proof", "warning", "error"):
        if text := getattr(adapter, name):
            yield name, text


def _print_slices(adapter: pb.Adapter) -> None:
    if adapter.slices:
        sys.stdout.write("\n")
        rows = ((slice_.module, str(slice_.rank), f"{slice_.scaling:g}") for slice_ in adapter.slices)
        print_table(("MODULE", "RANK", "SCALING"), rows)


def _print_plan(adapter: pb.Adapter, plan: pb.LoadPlan) -> None:
    names = {"adapter": adapter.adapter_id, "version": adapter.version}
    _print_lines({**names, **_content(adapter), **dict(_notes(adapter))})
    _print_slices(adapter)
    sys.stdout.write(
        f"\n{adapter.adapter_id} can be loaded; nothing has been changed. "
        + ("The content is new.\n" if plan.is_new else "It is what requests get already.\n")
    )
    for tier, size, fits in (
        (pb.ADAPTER_TIER_HOST, plan.host_bytes, plan.fits_host),
        (pb.ADAPTER_TIER_DEVICE, plan.device_bytes, plan.fits_device),
    ):
        evictions = [eviction for eviction in plan.evictions if eviction.tier == tier]
        verdict = "does not fit now: what runs or is pinned holds the memory, and a request would wait"
        if fits:
            verdict = "fits, and these copies would go:" if evictions else "fits"
        sys.stdout.write(f"{_tier(tier):<6} {mebibytes(size):>12}  {verdict}\n")
        for eviction in evictions:
            name = eviction.adapter_id or "an adapter that this client may not see"
            version = f"@{eviction.version[:DIGEST_DIGITS]}" if eviction.version else ""
            sys.stdout.write(f"{'':>21}{name}{version}\n")


def _alias_rows(alias: pb.Alias) -> Iterator[tuple[str, ...]]:
    total = sum(target.weight for target in alias.targets)
    for target in alias.targets:
        share = f"{target.weight / total:.1%}"
        yield alias.name, share, f"{target.weight:g}", target.adapter_id, target.version[:DIGEST_DIGITS]


def _state(adapter: pb.Adapter) -> str:
    """`ADAPTER_STATE_READY` as `ready`."""
    return pb.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_").lower()


def _tier(tier: "pb.AdapterTier.ValueType") -> str:
    """`ADAPTER_TIER_HOST` as `host`; unspecified as nothing."""
    return pb.AdapterTier.Name(tier).removeprefix("ADAPTER_TIER_").lower() if tier else ""


def _rank(adapter: pb.Adapter) -> str:
    return str(adapter.max_rank or "")  # 0: nothing of it has been read yet


def _size(adapter: pb.Adapter) -> str:
    return mebibytes(adapter.size_bytes) if adapter.size_bytes else ""


def _loaded(adapter: pb.Adapter) -> str:
    return f"{adapter.load_time.ToDatetime():%Y-%m-%d %H:%M:%SZ}" if adapter.load_time.seconds else ""
