"""The command `lorikeet`. Parses, dispatches and turns errors into one line and an exit status.

Nothing heavy is imported here: a client command starts in a fraction of a second, and only `serve` pays for torch.
Exit status: 0 done; 1 a call failed or something unexpected happened (with a traceback); 2 the command line, the
configuration or the model is at fault; 130 interrupted.
"""

import argparse
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from ..adapters.errors import ServingError


def main() -> NoReturn:
    """Entry point of the program."""
    status = run(sys.argv[1:])
    # Everything has been closed. To tear down an interpreter full of torch and transformers takes seconds, and frees
    # nothing that the end of the process does not free.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The exit status.

    Raises:
        SystemExit: `--help`, or a command line that cannot be parsed.
    """
    try:
        if arguments[:1] == ["serve"]:
            from .lean_imports import stand_in

            gc.disable()  # what comes in stays
            try:
                # structlog brings it in if it is there, and only colours tracebacks with it.
                with stand_in("rich", None):
                    from .cli_serve import serve
            finally:
                gc.enable()
            return serve(arguments[1:])
        from .cli_parser import build_parser  # imports what clients need, and `serve` would wait for

        return _run(build_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone: `lorikeet generate ... | head`.
        return 1
    except ServingError as error:
        sys.stderr.write(f"lorikeet: {error.message}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.command == "prepare-demo":
        from .cli_serve import prepare_demo

        return prepare_demo(options.cache_dir)
    if options.command == "adapters" and options.adapters_command == "inspect":
        from .cli_inspect import inspect

        return inspect(options.directory, options.model, options.json)
    if options.command == "adapters" and options.adapters_command == "golden":
        from .cli_golden import golden

        return golden(options.directory, options.model, options.prompt, options.prompts, options.tolerance)
    if options.command == "advise":
        from .cli_advise import advise_here

        return advise_here(options)
    if options.command == "eval" and options.model is not None:
        from .cli_eval import evaluate_here

        return evaluate_here(options)
    if options.command == "merge":
        from .cli_merge import merge

        return merge(options)
    from . import cli_client

    return cli_client.run(options)
