"""Streaming clients of one process, for `benchmarks/front.py`: their cost must not be the server's.

Reads one job as a JSON line from standard input, answers `{}` once connected, starts at the next line, and writes what
it saw to the file that the job names. Messages are kept as bytes and parsed when all is over.
"""

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import numpy as np
from lorikeet.protos.v1 import generation_pb2 as pb

TIMEOUT_S = 300.0
METHOD = "/lorikeet.v1.GenerationService/GenerateStream"
PROMPT = "Lorikeets are small birds with brush-tipped tongues who eat nectar, pollen and fruit."


async def run(job: dict[str, Any]) -> None:
    """Run `streams` clients, each making `repeats` calls one after the other.

    Args:
        job: address, name (a prefix of request ids), streams, repeats, tokens, channels, file.
    """
    channels = [
        # Without this, channels to one address share a connection.
        grpc.aio.insecure_channel(job["address"], options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(job["channels"])
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    calls = [
        channel.unary_stream(METHOD, request_serializer=pb.GenerateRequest.SerializeToString) for channel in channels
    ]
    seen: dict[str, list[tuple[float, bytes]]] = {}

    async def client(number: int) -> None:
        for repeat in range(job["repeats"]):
            name = f"{job['name']}-{number}-{repeat}"
            heard = seen[name] = []
            request = pb.GenerateRequest(
                request_id=name, prompt=PROMPT, max_tokens=job["tokens"], stopping=pb.Stopping(ignore_eos=True)
            )
            async for data in calls[number % len(calls)](request, timeout=TIMEOUT_S):
                heard.append((time.monotonic(), data))

    begin = time.monotonic()
    await asyncio.gather(*(client(number) for number in range(job["streams"])))
    end = time.monotonic()
    for channel in channels:
        await channel.close()
    messages, tokens = 0, 0
    arrivals: dict[str, Any] = {}
    for name, heard in seen.items():
        times: list[float] = []
        for at, data in heard:
            message = pb.GenerateStreamResponse.FromString(data)
            times += [at] * len(message.delta.token_ids)
        if len(times) != job["tokens"]:
            raise RuntimeError(f"a stream brought {len(times)} tokens instead of {job['tokens']}")
        messages += len(heard)
        tokens += len(times)
        arrivals[name] = np.array(times)
    np.savez(job["file"], **arrivals)
    answer = {"begin": begin, "end": end, "messages": messages, "tokens": tokens, "requests": len(seen)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.stdin.readline())))
