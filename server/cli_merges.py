"""`lorikeet adapters merge ...`: merges on a server."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from tqdm import tqdm

from ..protos.v1 import merges_pb2 as pb
from .cli_print import DIGEST_DIGITS, as_dict, mebibytes, print_json, print_json_value, print_table
from .client import LorikeetClient
from .client_merges import MergeOptions, progress_of, report_of
from .errors import ConfigError
from .evaluation.texts import read_texts

_HEADER = ("OPERATION", "STATE", "OUTPUT", "ADAPTERS", "STAGE", "DONE", "BEGUN")


def run_merges(client: LorikeetClient, options: argparse.Namespace) -> None:
    """Run one of the commands."""
    _COMMANDS[options.merge_command](client, options)


def _start(client: LorikeetClient, options: argparse.Namespace) -> None:
    pairs = [(reference, 1.0 if weight is None else weight) for reference, weight in options.adapters]
    operation = client.merges.start(pairs, options.output, **_options(options))
    if options.detach:
        sys.stdout.write(f"{operation.name}\n")
        return
    sys.stderr.write(f"{operation.name}: " + ", ".join(map(_version, progress_of(operation).adapters)) + "\n")
    bar = _Bar()
    try:
        report = client.merges.follow(operation, bar.show)
    except KeyboardInterrupt:
        bar.close()
        client.merges.cancel(operation.name)
        client.merges.wait(operation.name)
        sys.stderr.write("cancelled; nothing is left of it\n")
        raise
    finally:
        bar.close()
    _print_report(report, options)


def _options(options: argparse.Namespace) -> MergeOptions:
    """The fields of the request that flags say."""
    given: MergeOptions = {
        "to": options.to,
        "iterations": options.iterations,
        "unverified": options.unverified,
        "accept_loss": options.accept_loss,
        "allow_other_base": options.allow_other_base,
    }
    if options.onto is not None:
        given["onto"] = options.onto
    if options.text is not None:
        given["texts"] = read_texts(options.text, by_paragraph=options.by_paragraph)
    if options.calibration is not None:
        given["calibration"] = _read(options.calibration)
    return given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--calibration names {path}, which cannot be read: {reason}.") from error


class _Bar:
    """One bar on standard error for each stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def show(self, progress: pb.MergeProgress) -> None:
        """How far it is."""
        if progress.stage != self._stage:
            self.close()
            in_bytes = progress.unit == "bytes"
            unit = "B" if in_bytes else progress.unit.removesuffix("s")
            self._bar = tqdm(total=progress.total or None, desc=progress.stage, unit=unit, unit_scale=in_bytes)
            self._stage = progress.stage
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """End its line."""
        if self._bar is not None:
            self._bar.close()


def _print_report(report: pb.MergeReport, options: argparse.Namespace) -> None:
    if options.json:
        print_json(report)
        return
    for warning in report.warnings:
        sys.stderr.write(f"lorikeet: warning: {warning}\n")
    sys.stderr.write(f"merged onto {report.onto}: {report.onto_reason}\n")
    if report.table:
        sys.stdout.write(f"{report.table}\n\n")
    sys.stdout.write(f"wrote {report.output} ({mebibytes(report.weight_bytes)} of weights) in {report.seconds:.1f} s\n")


def _list(client: LorikeetClient, options: argparse.Namespace) -> None:
    operations = client.merges.list()
    if options.json:
        print_json_value([as_dict(operation) for operation in operations])
    elif operations:
        print_table(_HEADER, ((operation.name, *_row(progress_of(operation))) for operation in operations))
    else:
        sys.stdout.write("no merges\n")


def _get(client: LorikeetClient, options: argparse.Namespace) -> None:
    operation = client.merges.get(options.operation)
    if options.json:
        print_json(operation)
        return
    print_table(_HEADER, [(operation.name, *_row(progress_of(operation)))])
    if operation.done:
        sys.stdout.write("\n")
        sys.stdout.flush()
        _print_report(report_of(operation), options)


def _cancel(client: LorikeetClient, options: argparse.Namespace) -> None:
    client.merges.cancel(options.operation)
    client.merges.wait(options.operation)
    sys.stdout.write(f"cancelled {options.operation}\n")


def _delete(client: LorikeetClient, options: argparse.Namespace) -> None:
    client.merges.delete(options.operation)
    sys.stdout.write(f"deleted {options.operation}\n")


_COMMANDS: dict[str, Callable[[LorikeetClient, argparse.Namespace], None]] = {
    "start": _start,
    "list": _list,
    "get": _get,
    "cancel": _cancel,
    "delete": _delete,
}


def _row(progress: pb.MergeProgress) -> tuple[str, ...]:
    done = f"{progress.done / progress.total:.0%}" if progress.total else ""
    return (
        pb.MergeState.Name(progress.state).removeprefix("MERGE_STATE_").lower(),
        progress.output,
        ", ".join(map(_version, progress.adapters)),
        progress.stage,
        done,
        _time(progress.create_time),
    )


def _version(adapter: pb.MergedAdapter) -> str:
    weight = "" if adapter.weight == 1 else f":{adapter.weight:g}"
    return f"{adapter.id}@{adapter.version[:DIGEST_DIGITS]}{weight}"


def _time(when: Timestamp) -> str:
    return f"{when.ToDatetime():%Y-%m-%d %H:%M:%SZ}"
