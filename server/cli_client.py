"""The commands of `lorikeet` that talk to a server: generate, health and, in cli_adapters.py, adapters."""

import argparse
import sys
import time

from ..protos.v1 import generation_pb2
from .cli_adapters import run_adapters
from .cli_eval import evaluate_there
from .cli_print import DIGEST_DIGITS, print_json
from .client import GenerateOptions, LorikeetClient
from .status import RemoteError

# Options of `lorikeet generate` that are fields of a request.
_FIELDS = sorted(
    GenerateOptions.__annotations__.keys()
    - {"prompt", "messages", "token_ids", "request_id", "adapter_id", "strength", "adapters"}
)


def run(options: argparse.Namespace) -> int:
    """Run a parsed command.

    Returns:
        The exit status: 1 if the server answered with an error, or not at all.
    """
    try:
        with LorikeetClient(options.address, timeout_s=options.timeout, client_name=options.client) as client:
            return _COMMANDS[options.command](client, options)
    except RemoteError as error:
        text = str(error)
        if error.code == "UNAVAILABLE" and not error.reason:
            text = (
                f"no server answers at {options.address}. Is `lorikeet serve` running there? (--address names another.)"
            )
        elif error.code == "DEADLINE_EXCEEDED" and not error.reason:
            text = f"no answer within {options.timeout:g} s. Give it longer with --timeout."
        sys.stdout.flush()
        sys.stderr.write(f"lorikeet: {text}\n")
        return 1


def _health(client: LorikeetClient, options: argparse.Namespace) -> int:
    serving = client.is_serving(options.service)
    sys.stdout.write("SERVING\n" if serving else "NOT_SERVING\n")
    return 0 if serving else 1


def _generate(client: LorikeetClient, options: argparse.Namespace) -> int:
    request = _adapters(options.adapter)
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
        print_json(response)
        _print_stats(options, response, response.usage, time.monotonic() - begun)
        return 0
    started = generation_pb2.Started()
    for event in client.stream(**request):
        if event.HasField("started"):
            started = event.started
        elif event.HasField("delta"):
            sys.stdout.write(event.delta.text)
            sys.stdout.flush()
        else:
            sys.stdout.write("\n")
            _print_stats(options, started, event.finished.usage, time.monotonic() - begun)
    return 0


def _adapters(given: list[tuple[str, float | None]]) -> GenerateOptions:
    """The fields of a request that name adapters."""
    if len(given) > 1:
        return {"adapters": [(reference, 1.0 if weight is None else weight) for reference, weight in given]}
    request: GenerateOptions = {}
    for reference, weight in given:
        request["adapter_id"] = reference
        if weight is not None:
            request["strength"] = weight
    return request


def _print_stats(
    options: argparse.Namespace,
    answered: generation_pb2.Started | generation_pb2.GenerateResponse,
    usage: generation_pb2.Usage,
    seconds: float,
) -> None:
    if options.stats:
        names = [f"{_name(each.adapter)} x {each.weight:g}" for each in answered.adapters] or [_name(answered.adapter)]
        sys.stderr.write(
            f"{' + '.join(names)}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
            f"{usage.generated_tokens} generated in {seconds:.2f} s, {usage.generated_tokens / seconds:.1f} tokens/s\n"
        )


def _name(adapter: generation_pb2.AdapterVersion) -> str:
    return f"{adapter.adapter_id} @ {adapter.version[:DIGEST_DIGITS]}" if adapter.adapter_id else "base"


_COMMANDS = {"eval": evaluate_there, "generate": _generate, "adapters": run_adapters, "health": _health}
