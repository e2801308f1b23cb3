"""A client process for `benchmarks/serving.py`: plays a trace to a server over gRPC and writes down what it sees.

Reads a job as a JSON line from standard input and answers with a JSON line. With `in_flight` null, requests are sent
when the trace says, whatever has been answered by then; else as soon as fewer than so many are open.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub

CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20)]
# Before the first arrival, so that it is not late.
LEAD_S = 0.2


@dataclass(slots=True)
class Seen:
    """One request, in seconds after the beginning of the run.

    Attributes:
        due: when the trace has it arrive; with `in_flight`, when its turn came.
        sent: when the call was made.
        message_at: when each message with tokens came.
        tokens: how many tokens each of these brought.
        ended: when the call ended.
        code: of its status.
    """

    due: float
    sent: float = 0.0
    message_at: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: float = 0.0
    code: str = "OK"


async def play(job: dict[str, Any]) -> list[Seen]:
    """Run a job.

    Args:
        job: address; in_flight, or None; deadline_s of each call; requests, each with arrival_s, adapter_id, prompt
            (token ids) and tokens.
    """
    async with grpc.aio.insecure_channel(job["address"], options=CHANNEL_OPTIONS) as channel:
        await channel.channel_ready()
        stub = GenerationServiceStub(channel)
        begin = time.monotonic() + LEAD_S
        is_open_loop = job["in_flight"] is None
        free = asyncio.Semaphore(job["in_flight"] or 1)

        async def call(request: dict[str, Any], seen: Seen) -> None:
            message = pb.GenerateRequest(
                adapter_id=request["adapter_id"],
                token_ids=request["prompt"],
                max_tokens=request["tokens"],
                sampling=pb.Sampling(temperature=0.0),
                stopping=pb.Stopping(ignore_eos=True),
            )
            seen.sent = time.monotonic() - begin
            try:
                async for response in stub.GenerateStream(message, timeout=job["deadline_s"]):
                    if response.delta.token_ids:
                        seen.message_at.append(time.monotonic() - begin)
                        seen.tokens.append(len(response.delta.token_ids))
            except grpc.aio.AioRpcError as error:
                seen.code = error.code().name
            finally:
                seen.ended = time.monotonic() - begin
                if not is_open_loop:
                    free.release()

        runs: list[tuple[Seen, asyncio.Task[None]]] = []
        for request in job["requests"]:
            if is_open_loop:
                due = request["arrival_s"]
                await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            else:
                await free.acquire()
                due = time.monotonic() - begin
            seen = Seen(due)
            runs.append((seen, asyncio.create_task(call(request, seen))))
        await asyncio.gather(*(task for _, task in runs))
    return [seen for seen, _ in runs]


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps([asdict(seen) for seen in asyncio.run(play(json.loads(line)))]) + "\n")
        sys.stdout.flush()
