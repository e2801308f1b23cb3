"""The command line of every command but `serve`, whose flags are the settings of config.py. Imports no torch."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from .access import CLIENT_ENV, CLIENT_KEY, check_client_name
from .addresses import DEFAULT_ADDRESS
from .cli_adapter_flags import add_adapters, weighted_adapter
from .cli_advise import add_advise
from .cli_eval import add_eval
from .cli_merge import add_merge


def build_parser() -> argparse.ArgumentParser:
    """Every command but `serve`, whose flags are the settings of config.py."""
    parser = argparse.ArgumentParser(
        prog="lorikeet", description="One NF4 base model, many unmerged LoRA adapters, one gRPC server."
    )
    parser.add_argument("--version", action="version", version=f"lorikeet {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("serve", help="run a server (`lorikeet serve --help` lists its settings)")

    client = argparse.ArgumentParser(add_help=False)
    client.add_argument("--address", default=DEFAULT_ADDRESS, help="server, as host:port [%(default)s]")
    client.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up after this long, above 0 [never]")
    client.add_argument(
        "--client",
        type=_client_name,
        metavar="NAME",
        default=os.environ.get(CLIENT_ENV, ""),
        help=f"who calls, for the server's policy file; sent as {CLIENT_KEY} [${CLIENT_ENV}, else nobody]",
    )

    _add_generate(commands.add_parser("generate", parents=[client], help="continue a prompt"))
    add_adapters(commands.add_parser("adapters", help="load, replace, pin, alias and look at adapters"), client)
    health = commands.add_parser("health", parents=[client], help="say whether a server is serving (exit status 0)")
    health.add_argument("--service", default="", help="full name of one gRPC service [the server as a whole]")
    demo = commands.add_parser("prepare-demo", help="fetch and prepare the embedded demo base")
    demo.add_argument("--cache-dir", type=Path, metavar="DIR", help="where models are kept [~/.cache/lorikeet]")
    add_eval(commands.add_parser("eval", parents=[client], help="perplexity of a text with adapters"))
    add_advise(commands.add_parser("advise", help="say which way of deploying an adapter fits"))
    add_merge(commands.add_parser("merge", help="write the base with adapters merged into it as one model"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", help="text to continue; `-` or nothing reads standard input")
    add(
        "--adapter",
        action="append",
        default=[],
        type=weighted_adapter,
        metavar="ID[:WEIGHT]",
        help="what answers: an id, an alias or id@digest-prefix, and what its effect is multiplied by [1]; given more "
        "than once, up to 8 answer together [the base]",
    )
    add(
        "--routing-key",
        metavar="KEY",
        help="requests with the same key get the same target of an alias with several; up to 256 characters "
        "[a target is drawn for each request]",
    )
    add(
        "--max-tokens",
        type=_whole(31),
        metavar="N",
        help="tokens to generate at most [as the context allows, up to 256]",
    )
    add("--chat", action="store_true", help="the prompt is a user's message, answered through the chat template")
    add("--system", metavar="TEXT", help="system message before the user's; implies --chat")
    add("--json", action="store_true", help="print the whole response as JSON at the end instead of streaming text")
    add("--stats", action="store_true", help="print version, token counts and speed to standard error at the end")
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--temperature", type=float, metavar="T", help="0 to 100; 0 is greedy [1]")
    add("--top-k", type=_whole(31), metavar="K", help="keep the K likeliest tokens; 0 is off [0]")
    add("--top-p", type=float, metavar="P", help="nucleus mass, above 0 to 1 [1]")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one, 0 to 1 [0]")
    add("--repetition-penalty", type=float, metavar="X", help="above 0 to 100; 1 is off [1]")
    add("--presence-penalty", type=float, metavar="X", help="-2 to 2 [0]")
    add("--frequency-penalty", type=float, metavar="X", help="-2 to 2 [0]")
    add("--seed", type=_whole(64), metavar="N", help="makes a sampled output repeatable")
    stopping = parser.add_argument_group("stopping")
    add = stopping.add_argument
    add("--stop", action="append", metavar="TEXT", help="end the output before this text; may be given more than once")
    add("--stop-token-ids", type=_whole(32), nargs="+", metavar="ID", help="end the output at these tokens")
    add("--include-stop", action="store_true", default=None, help="keep the stop text in the output")
    add("--ignore-eos", action="store_true", default=None, help="go on past the model's end of sequence")
    add("--min-tokens", type=_whole(31), metavar="N", help="no end before this many tokens [0]")


def _whole(bits: int) -> Callable[[str], int]:
    """Numbers that a field of the request has room for; which of them make sense, the server says."""
    most = 2**bits - 1

    def number(text: str) -> int:
        if not 0 <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give 0 to {most}")
        return value

    number.__name__ = "whole number"  # argparse names it where the text is no number
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give seconds above 0, or leave it out")
    return seconds


def _client_name(name: str) -> str:
    """A name that metadata can carry; the empty one is nobody's."""
    if not name:
        return ""
    try:
        return check_client_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (It may come from ${CLIENT_ENV}.)") from None
