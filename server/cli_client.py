"""The commands of `lorikeet` that talk to a server: generate, adapters, health. They print; nothing else here does."""

import argparse
import json
import sys
import time
from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from ..protos.v1 import adapters_pb2, generation_pb2
from .client import GenerateOptions, LorikeetClient
from .status import RemoteError

# Options of `lorikeet generate` that are fields of a request.
_FIELDS = sorted(
    GenerateOptions.__annotations__.keys() - {"prompt", "messages", "token_ids", "request_id", "adapter_id"}
)


def run(options: argparse.Namespace) -> int:
    """Run a parsed command.

    Returns:
        The exit status: 1 if the server answered with an error, or not at all.
    """
    try:
        with LorikeetClient(options.address, timeout_s=options.timeout) as client:
            return _COMMANDS[options.command](client, options)
    except RemoteError as error:
        text = str(error)
        if error.code == "UNAVAILABLE" and not error.reason:
            text = (
                f"no server answers at {options.address}. Is `lorikeet serve` running there? (--address names another.)"
            )
        sys.stdout.flush()
        sys.stderr.write(f"lorikeet: {text}\n")
        return 1


def _health(client: LorikeetClient, options: argparse.Namespace) -> int:
    serving = client.is_serving(options.service)
    sys.stdout.write("SERVING\n" if serving else "NOT_SERVING\n")
    return 0 if serving else 1


def _generate(client: LorikeetClient, options: argparse.Namespace) -> int:
    request: GenerateOptions = {"adapter_id": options.adapter}
    request |= {name: value for name in _FIELDS if (value := getattr(options, name, None)) is not None}  # type: ignore[typeddict-item]
    text = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
    if options.chat or options.system is not None:
        system = [("system", options.system)] if options.system is not None else []
        request["messages"] = [*system, ("user", text)]
    else:
        request["prompt"] = text
    begun = time.monotonic()
    if options.json:
        response = client.generate(**request)
        _print_json(response)
        _print_stats(options, response.adapter, response.usage, time.monotonic() - begun)
        return 0
    adapter = generation_pb2.AdapterVersion()
    for event in client.stream(**request):
        if event.HasField("started"):
            adapter = event.started.adapter
        elif event.HasField("delta"):
            sys.stdout.write(event.delta.text)
            sys.stdout.flush()
        else:
            sys.stdout.write("\n")
            _print_stats(options, adapter, event.finished.usage, time.monotonic() - begun)
    return 0


def _print_stats(
    options: argparse.Namespace,
    adapter: generation_pb2.AdapterVersion,
    usage: generation_pb2.Usage,
    seconds: float,
) -> None:
    if options.stats:
        name = f"{adapter.adapter_id} @ {adapter.version[:12]}" if adapter.adapter_id else "base"
        sys.stderr.write(
            f"{name}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.generated_tokens} "
            f"generated in {seconds:.2f} s, {usage.generated_tokens / seconds:.1f} tokens/s\n"
        )


def _adapters(client: LorikeetClient, options: argparse.Namespace) -> int:
    match options.adapters_command:
        case "list":
            adapters = client.list_adapters()
            if options.json:
                sys.stdout.write(json.dumps([_as_dict(adapter) for adapter in adapters], indent=2) + "\n")
            elif adapters:
                _print_table(_HEADER, (_row(adapter) for adapter in adapters))
            else:
                sys.stdout.write("no adapters\n")
        case "unload":
            client.unload_adapter(options.adapter)
            sys.stdout.write(f"unloaded {options.adapter}\n")
        case "get":
            _print_adapter(client.get_adapter(options.adapter), options.json)
        case _:
            _print_adapter(client.load_adapter(options.adapter, options.path), options.json)
    return 0


_COMMANDS = {"generate": _generate, "adapters": _adapters, "health": _health}

_HEADER = ("ADAPTER", "STATE", "TIER", "RANK", "SIZE", "IN FLIGHT", "VERSION", "FOLDER")


def _row(adapter: adapters_pb2.Adapter) -> tuple[str, ...]:
    return (
        adapter.adapter_id,
        _word(adapters_pb2.AdapterState.Name(adapter.state)),
        _word(adapters_pb2.AdapterTier.Name(adapter.tier)),
        str(adapter.max_rank),
        f"{adapter.size_bytes / 2**20:.1f} MiB",
        str(adapter.in_flight_requests),
        adapter.version[:12],
        adapter.source,
    )


def _print_adapter(adapter: adapters_pb2.Adapter, as_json: bool) -> None:
    if as_json:
        _print_json(adapter)
        return
    for name, value in zip(_HEADER, _row(adapter), strict=True):
        sys.stdout.write(f"{name.lower():<10} {value}\n")
    if adapter.load_time.seconds:
        sys.stdout.write(f"{'loaded':<10} {adapter.load_time.ToJsonString()}\n")
    if adapter.method:
        sys.stdout.write(f"{'method':<10} {adapter.method}\n")
    if adapter.warning:
        sys.stdout.write(f"{'warning':<10} {adapter.warning}\n")
    if adapter.error:
        sys.stdout.write(f"{'error':<10} {adapter.error}\n")
    sys.stdout.write("\n")
    _print_table(("MODULE", "RANK", "SCALING"), ((s.module, str(s.rank), f"{s.scaling:g}") for s in adapter.slices))


def _word(enum_name: str) -> str:
    """`ADAPTER_STATE_READY` as `ready`."""
    return enum_name.rpartition("_")[2].lower()


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _print_json(message: Message) -> None:
    sys.stdout.write(json.dumps(_as_dict(message), indent=2) + "\n")


def _as_dict(message: Message) -> dict[str, object]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
