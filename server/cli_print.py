"""How client commands print: tables, JSON, sizes."""

import json
import sys
from collections.abc import Iterable, Sequence

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

DIGEST_DIGITS = 12  # of a digest, in tables


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], optional: Iterable[str] = ()) -> None:
    """Print columns as wide as they need to be.

    Args:
        header: of the columns.
        rows: their cells.
        optional: columns that are left out when all of their cells are empty.
    """
    table = [header, *rows]
    columns = [c for c in zip(*table, strict=True) if c[0] not in set(optional) or any(c[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def print_json(message: Message) -> None:
    """Print a message."""
    print_json_value(as_dict(message))


def print_json_value(value: object) -> None:
    """Print plain dicts and lists."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def as_dict(message: Message) -> dict[str, object]:
    """A message with the field names of its proto, unset fields included."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def mebibytes(size: int) -> str:
    """Bytes, as `1.5 MiB`."""
    return f"{size / 2**20:.1f} MiB"
