"""The flags of `lorikeet adapters ...`. Imports nothing heavy, so that `--help` costs nothing."""

import argparse
from pathlib import Path

from .cli_merge import add_merge_rules

_REFERENCE = "an id, or id@digest-prefix for one version"


def add_adapters(parser: argparse.ArgumentParser, client: argparse.ArgumentParser) -> None:
    """Add the commands.

    Args:
        parser: of `lorikeet adapters`.
        client: flags of every command that talks to a server.
    """
    commands = parser.add_subparsers(dest="adapters_command", metavar="COMMAND", required=True)
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def command(name: str, text: str, *, json: bool = True) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[client, as_json] if json else [client], help=text, description=text)

    command("list", "List all adapters.")
    get = command("get", "Describe one adapter and all its versions.")
    get.add_argument("adapter", metavar="ID", help=_REFERENCE)
    _add_load(command("load", "Load an adapter, or load it again; returns when requests can use it."))
    unload = command("unload", "Make an adapter unknown to later requests.", json=False)
    unload.add_argument("adapter", metavar="ID", help="an id that is neither pinned nor the target of an alias")
    rollback = command("rollback", "Make an earlier version current again; twice is back and forth.")
    rollback.add_argument("adapter", metavar="ID", help="an id")
    rollback.add_argument(
        "version", nargs="?", default="", metavar="DIGEST", help="version, 4 digits or more [the one before]"
    )
    prefetch = command("prefetch", "Bring a version into memory, and return when it is there; it may be evicted again.")
    prefetch.add_argument("adapter", metavar="ID", help=f"{_REFERENCE}; or an alias with one target")
    pin = command("pin", "Keep an adapter, in whatever version is current, in memory; returns when it is there.")
    pin.add_argument("adapter", metavar="ID", help="an id")
    for parser in (prefetch, pin):
        parser.add_argument(
            "--tier", choices=("host", "device"), default="device", help="which memory, host or device [%(default)s]"
        )
    unpin = command("unpin", "Let a pinned adapter be evicted again.")
    unpin.add_argument("adapter", metavar="ID", help="an id")
    text = "Names that lead to versions, at once and by weight."
    _add_alias(commands.add_parser("alias", help=text, description=text), client, as_json)
    text = "Merge adapters into the base on the server, as a model below its --merge-dir."
    _add_merge(commands.add_parser("merge", help=text, description=text), client, as_json)
    _add_local(commands, as_json)


def weighted_adapter(text: str) -> tuple[str, float | None]:
    """`ID` or `ID:WEIGHT`; no reference has a colon. The server says which weights it takes."""
    reference, colon, given = text.partition(":")
    if not colon:
        return reference, None
    try:
        weight = float(given)
    except ValueError:
        weight = None
    if not reference or weight is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no adapter with a weight; give an id, an alias or id@digest-prefix, then nothing or :WEIGHT "
            "with a number, as in kjv:0.7."
        )
    return reference, weight


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ID", help="the id to publish it under")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--path",
        default="",
        metavar="DIR",
        help="folder inside one of the server's --adapters directories [the one named ID]",
    )
    where.add_argument(
        "--source",
        default="",
        metavar="URI",
        help="fetch it from hf://org/name[@revision], s3://, gs://, http:// or https:// instead; must begin with one "
        "of the server's --adapter-sources [none]",
    )
    add(
        "--expected-version",
        default="",
        metavar="DIGEST",
        help="refuse other content; a version's 64 digits [any]",
    )
    add("--dry-run", action="store_true", help="only check it, and say whether it would fit and what would be evicted")
    add("--allow-zero", action="store_true", help="accept an adapter that changes nothing")
    add(
        "--allow-other-base",
        action="store_true",
        help="accept an adapter that names another base, if its shapes fit",
    )


def _add_alias(
    parser: argparse.ArgumentParser, client: argparse.ArgumentParser, as_json: argparse.ArgumentParser
) -> None:
    commands = parser.add_subparsers(dest="alias_command", metavar="COMMAND", required=True)
    text = "Create an alias, or move it: later requests see the new targets, earlier ones keep their version."
    move = commands.add_parser("set", parents=[client, as_json], help=text, description=text)
    move.add_argument("name", metavar="NAME", help="what requests may name; no adapter's id")
    move.add_argument(
        "targets",
        nargs="+",
        type=_weighted_target,
        metavar="TARGET[=WEIGHT]",
        help=f"{_REFERENCE} [the current one]; its weight is above 0 and relative to the others' [1]; 1 to 8 targets",
    )
    delete = commands.add_parser("delete", parents=[client], help="make an alias unknown to later requests")
    delete.add_argument("name", metavar="NAME", help="the alias")
    commands.add_parser("list", parents=[client, as_json], help="list all aliases")


def _add_merge(
    parser: argparse.ArgumentParser, client: argparse.ArgumentParser, as_json: argparse.ArgumentParser
) -> None:
    commands = parser.add_subparsers(dest="merge_command", metavar="COMMAND", required=True)
    text = "Merge, and show how far it is until it is done; interrupted, the merge is cancelled."
    start = commands.add_parser("start", parents=[client, as_json], help=text, description=text)
    start.add_argument(
        "adapters",
        nargs="+",
        type=weighted_adapter,
        metavar="ID[:WEIGHT]",
        help="an id, an alias with one target or id@digest-prefix, and what its effect is multiplied by [1]; of "
        "several, up to 8, the sum is merged",
    )
    start.add_argument("--output", required=True, metavar="NAME", help="the model's directory below --merge-dir")
    start.add_argument("--detach", action="store_true", help="print the operation's name and do not wait for it")
    add_merge_rules(start)
    text = "List the merges that the server remembers."
    commands.add_parser("list", parents=[client, as_json], help=text, description=text)
    for name, text in (
        ("get", "Show how far a merge is, or what became of it."),
        ("cancel", "Let a merge end; nothing is left of it."),
        ("delete", "Forget a merge that has ended; its model stays."),
    ):
        command = commands.add_parser(name, parents=[client, as_json][: 2 if name == "get" else 1], help=text)
        command.add_argument("operation", metavar="OPERATION", help="its name, as `start` and `list` show it")


def _add_local(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", as_json: argparse.ArgumentParser
) -> None:
    """The commands that need no server."""
    text = "Check an adapter folder on this machine; needs no server."
    inspect = commands.add_parser("inspect", parents=[as_json], help=text, description=text)
    inspect.add_argument("directory", type=Path, metavar="DIR", help="the folder that PEFT saved")
    inspect.add_argument(
        "--model",
        metavar="MODEL",
        help="base to compare with: a Hugging Face directory or hub id, or demo [only the files are checked]",
    )
    text = "Write a golden file into an adapter folder; a server replays it at load. Needs no server."
    golden = commands.add_parser("golden", help=text, description=text)
    add = golden.add_argument
    add("directory", type=Path, metavar="DIR", help="the folder that PEFT saved")
    add(
        "--model",
        required=True,
        metavar="MODEL",
        help="the base it was trained for: a Hugging Face directory or hub id, or demo",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt to replay; may be given more than once, up to 64 in all [six built-in ones]",
    )
    add("--prompts", type=Path, metavar="FILE", help="UTF-8 file with a prompt a line, beside those of --prompt [none]")
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference, in nats, that a server that computes in 16 bit may show, above 0 to 10 [0.2]",
    )


def _weighted_target(text: str) -> tuple[str, float]:
    """`TARGET` or `TARGET=WEIGHT`."""
    target, equals, given = text.partition("=")
    try:
        weight = float(given) if equals else 1.0
    except ValueError:
        weight = 0.0
    if not target or not 0 < weight < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no target; give an id or id@digest-prefix, then nothing or =WEIGHT with a number above 0. To "
            "send a target no requests, leave it out."
        )
    return target, weight
