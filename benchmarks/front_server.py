"""The gRPC front with nothing behind it, as a process: `benchmarks/front.py` starts it and asks it over pipes.

Real are gRPC, the interceptor, the services, logs and metrics of calls, tokenizing and detokenizing. The engine is a
double: its step thread gives every request a token at a fixed pace, and writes down when.

Commands come as lines on standard input, answers go as JSON lines to standard output:

    mark           -> seconds of wall and processor time so far, by thread, and resident bytes
    emits FILE     -> writes when each token of each request was emitted, forgets it, and answers {}
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from google.longrunning.operations_pb2_grpc import OperationsServicer
from lorikeet.adapters.adapter_tokenizer import BASE_VOCABULARY, AdapterVocabulary
from lorikeet.protos.v1.adapters_pb2_grpc import AdapterServiceServicer
from lorikeet.protos.v1.merges_pb2_grpc import MergeServiceServicer
from lorikeet.server.engine.detokenizer import DetokenizerFactory
from lorikeet.server.engine.engine import SWITCH_INTERVAL_S
from lorikeet.server.engine.output import Output
from lorikeet.server.engine.request import Failed, Request
from lorikeet.server.engine.sampler import SampledToken
from lorikeet.server.errors import CancelledError
from lorikeet.server.event_stream import EventBridge
from lorikeet.server.generation_service import GenerationService
from lorikeet.server.grpc_server import GrpcServer
from lorikeet.server.logs import configure_logs
from lorikeet.server.metrics import ServerMetrics
from lorikeet.server.prompts import PromptEncoder
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

MAX_CONTEXT = 8192
TEXT = (
    "In the beginning was the word; the quick brown fox jumps over the lazy dog while the parrot looks on, and "
    "lorikeets eat nectar, pollen and fruit. Größe, café and 日本語 span several bytes, so do 🦜 and others. "
)


class PacedEngine:
    """Takes requests as the engine does, and answers each with the next token of a text at every step.

    Args:
        interval_s: from the beginning of a step to that of the next one.
        tokenizer: of transformers.
    """

    def __init__(self, interval_s: float, tokenizer: Any) -> None:
        self._interval_s = interval_s
        self._make_stream = DetokenizerFactory(tokenizer)
        self._text: Sequence[int] = tokenizer.encode(TEXT, add_special_tokens=False)
        self._news: list[Request | str] = []
        self._live: dict[str, tuple[Request, Output]] = {}
        self._lock = threading.Lock()
        self._emits: dict[str, array[float]] = {}
        self.thread = threading.Thread(target=self._run_or_end, name="step", daemon=True)

    def submit(self, request: Request) -> None:
        """Accept a request."""
        with self._lock:
            self._news.append(request)

    def abort(self, request_id: str) -> None:
        """End a request."""
        with self._lock:
            self._news.append(request_id)

    def take_emits(self) -> dict[str, "array[float]"]:
        """`time.monotonic()` seconds of each token, by request, since the last time."""
        emits, self._emits = self._emits, {}
        return emits

    def _run_or_end(self) -> None:
        try:
            self._run()
        finally:
            os._exit(1)  # or everybody would wait for ever

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._lock:
                news, self._news = self._news, []
            for item in news:
                if isinstance(item, Request):
                    self._live[item.request_id] = item, Output(item, self._make_stream, frozenset(), MAX_CONTEXT)
                elif item in self._live:
                    self._live.pop(item)[0].emit(Failed(CancelledError("The client cancelled the request.")))
            for request, output in list(self._live.values()):
                self._advance(request, output)
            due = max(due + self._interval_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _advance(self, request: Request, output: Output) -> None:
        token_id = self._text[len(request.output_token_ids) % len(self._text)]
        delta, finished = output.add(SampledToken(token_id, None))
        self._emits.setdefault(request.request_id, array("d")).append(time.monotonic())
        request.emit(delta)
        if finished is not None:
            del self._live[request.request_id]
            request.emit(finished)


class _BaseOnly:
    """Stands in for the adapters: requests for the base never ask for one."""

    def resolve(self, *_: object) -> Any:
        raise NotImplementedError

    def release(self, *_: object) -> None:
        raise NotImplementedError

    def vocabulary(self, _: object) -> AdapterVocabulary:
        return BASE_VOCABULARY


async def serve(model: Path, interval_s: float) -> None:
    """Serve until standard input ends."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    vocab_size = len(tokenizer)
    engine = PacedEngine(interval_s, tokenizer)
    prompts = PromptEncoder(tokenizer, vocab_size)
    loop = asyncio.get_running_loop()
    service = GenerationService(engine, _BaseOnly(), prompts, EventBridge(loop), MAX_CONTEXT)
    server = GrpcServer(4 * 2**20, ServerMetrics(CollectorRegistry(), 100).on_call)
    others = AdapterServiceServicer(), MergeServiceServicer(), OperationsServicer()
    port = await server.start("127.0.0.1", 0, service, *others)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    engine.thread.start()
    _answer({"port": port})
    stop = asyncio.Event()
    threading.Thread(target=_obey, args=(engine, threading.get_ident(), loop, stop), daemon=True).start()
    await stop.wait()
    await server.stop(0)
    prompts.close()


def _obey(engine: PacedEngine, loop_thread: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Carry commands out, on a thread of its own: the loop's time is what is measured."""
    assert engine.thread.ident is not None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "mark":
            _answer(
                {
                    "wall": time.monotonic(),
                    "process": time.process_time(),
                    "loop": time.clock_gettime(time.pthread_getcpuclockid(loop_thread)),
                    "step": time.clock_gettime(time.pthread_getcpuclockid(engine.thread.ident)),
                    "resident_bytes": psutil.Process().memory_info().rss,
                }
            )
        elif command == "emits":
            # An engine's request id is the client's with "#" and a number behind it.
            emits = {name.rpartition("#")[0]: np.array(times) for name, times in engine.take_emits().items()}
            np.savez(argument, **emits)
            _answer({})
    loop.call_soon_threadsafe(stop.set)


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a tokenizer")
    parser.add_argument("--interval", type=float, required=True, help="seconds from step to step")
    options = parser.parse_args()
    configure_logs("info", "json")
    asyncio.run(serve(options.model, options.interval))
    return 0


if __name__ == "__main__":
    sys.exit(main())
