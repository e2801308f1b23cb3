"""`make bench`: Lorikeet beside its peers on this CPU, and what each adapter format costs; all sides take turns.

The base is the demo base with random adapters over all linears. The peers are PEFT's mixed batch on the same NF4 base
and llama.cpp on the GGUF file that the demo base is made of; each runs in the type and with the choices that are
fastest for it here. Decode steps include picking the likeliest token on every side. Prints ratios first, with their
goals, and writes JSON and plots. A peer that is not installed is named as missing.

llama.cpp comes with `pip install -c constraints.txt -e '.[peers]'`. That compiles it, for this very processor, and
takes many minutes, which is why `make setup` leaves it out.
"""

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from beside_peers import measure_beside_peers
from lorikeet.server.base.demo import prepare_demo_base, prepare_demo_gguf
from lorikeet.server.config import ServerConfig
from lorikeet.server.errors import BaseModelError
from machine import describe_machine, warn_if_busy
from options import parser_of
from workload import Size

SEED = 7
PEERS, FORMATS = "peers", "formats"
DEFAULT_SIZES = {
    PEERS: Size(streams=(1, 8, 32), prompt=64, tokens=16, adapters=8, rounds=3),
    # Only decode steps count, so prompts are short; differences are small, so there are more rounds.
    FORMATS: Size(streams=(8, 32), prompt=16, tokens=16, adapters=4, rounds=5),
}


def main() -> int:
    """Run both, or the one asked for.

    Returns:
        The exit status.
    """
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    warn_if_busy(machine, "the numbers will be worse than it is")
    config = ServerConfig()
    base = options.model or prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)
    if options.only in (None, PEERS):
        measure_beside_peers(base, gguf_of(options, config), size_of(PEERS, options), options, machine)
    if options.only in (None, FORMATS):
        if importlib.util.find_spec("peft") is None:
            sys.stderr.write("The cost of formats is not measured: PEFT, which makes the adapters, is not installed.\n")
            return 0
        from format_cost import measure_formats

        measure_formats(
            base,
            size_of(FORMATS, options),
            rank=options.rank,
            threads=options.threads,
            seed=SEED,
            machine=machine,
            out=options.out,
        )
    return 0


def gguf_of(options: argparse.Namespace, config: ServerConfig) -> Path | None:
    """The base as a GGUF file, where there is one and somebody to read it."""
    if options.gguf is not None or options.model is not None or importlib.util.find_spec("llama_cpp") is None:
        given: Path | None = options.gguf
        return given
    try:
        return prepare_demo_gguf(config.cache_dir, wheel=config.demo_wheel)
    except BaseModelError as error:
        sys.stderr.write(f"{error.message}\n")
        return None


def parse() -> argparse.Namespace:
    """The command line; the defaults are what the README's numbers were made with, those of --only formats second."""
    parser = parser_of(__doc__, "threads", "model", "out")
    add = parser.add_argument
    add("--only", choices=DEFAULT_SIZES, help="Lorikeet beside its peers, or the cost of each format [both]")
    add("--streams", type=int, nargs="+", help="requests at the same time [1 8 32; 8 32]")
    add("--prompt", type=int, help="tokens in each prompt [64; 16]")
    add("--tokens", type=int, help="tokens to generate for each [16; 16]")
    add("--adapters", type=int, help="random adapters, or of each format [8; 4]")
    add("--rank", type=int, default=16, help="of each adapter [16]")
    add("--rounds", type=int, help="times that every side runs [3; 5]")
    add("--gguf", type=Path, help="the same model as a GGUF file, for llama.cpp [the demo base's]")
    return parser.parse_args()


def size_of(part: str, options: argparse.Namespace) -> Size:
    """The part's default size with what the command line says instead."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    return dataclasses.replace(DEFAULT_SIZES[part], **{name: value for name, value in given.items() if value})


if __name__ == "__main__":
    sys.exit(main())
