"""How a server ends, with fakes for model and engine: signals, drain, the engine's death."""

import asyncio
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lorikeet.protos.v1.generation_pb2 import GenerateRequest
from lorikeet.protos.v1.generation_pb2_grpc import GenerationServiceStub
from lorikeet.server.config import ServerConfig
from lorikeet.server.lifecycle import serve_until_stopped
from lorikeet.server.metrics import ServerMetrics
from lorikeet.server.policy.holder import PolicyHolder
from prometheus_client import CollectorRegistry

from .fake_manager import FakeManager
from .fakes import PATIENCE_S, FakeAdapters, FakeEngine, FakeTokenizer, wait_for


class Engine(FakeEngine):
    """Drains when nothing is in flight any more."""

    def __init__(self):
        super().__init__(script=lambda request: [])
        self.log = []
        self.on_dead = None

    def start(self):
        self.log.append("start")

    def refuse_more(self):
        self.log.append("refuse")

    def drain(self, deadline_s):
        self.log.append(f"drain {deadline_s:g}")
        if self.submitted:
            assert self.on_abort.wait(PATIENCE_S)

    def stop(self):
        self.log.append("stop")


class Manager(FakeManager, FakeAdapters):
    def __init__(self):
        FakeManager.__init__(self)
        FakeAdapters.__init__(self)

    def restore(self):
        self.log.append("restore")

    def finish_restore(self):
        self.log.append("finish restore")

    def start(self):
        self.log = ["start"]

    def close(self):
        self.log.append("close")


@pytest.fixture
def app():
    registry, manager = CollectorRegistry(), Manager()
    return SimpleNamespace(
        config=ServerConfig(port=0, metrics_port=0, drain_timeout_s=7),
        base=SimpleNamespace(
            tokenizer=FakeTokenizer(),
            vocab_size=100,
            device="cpu",
            compute_dtype="torch.float32",
            nf4_bytes=1000,
            fingerprint=None,
        ),
        manager=manager,
        composition=manager.composition,
        tokenizers=SimpleNamespace(rules=lambda vocabulary: None, close=lambda: None),
        state=SimpleNamespace(close=lambda: None, incoming=Path("incoming")),
        policy=PolicyHolder(None),
        watcher=None,
        engine=Engine(),
        max_context=64,
        metrics=ServerMetrics(registry, 10),
        registry=registry,
    )


async def run(app, when_ready):
    """Serve, and run `when_ready(ready, channel)` beside, which ends the server. Returns the exit status.

    Whichever of both fails first ends the other and is what the test reports; nothing waits for ever.
    """
    ready, num_threads = asyncio.get_running_loop().create_future(), threading.active_count()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        serving = group.create_task(serve_until_stopped(app, ready.set_result))
        async with grpc.aio.insecure_channel((await ready).address) as channel:
            await when_ready(ready.result(), channel)
            status = await serving
    assert app.engine.log[0] == "start"
    assert app.engine.log[-1] == "stop"
    assert app.manager.log == ["start", "restore", "finish restore", "close"]
    # gRPC's and the loop's own ones stay.
    await wait_for(lambda: threading.active_count() <= num_threads + 3)
    return status


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


async def test_ready_says_what_is_served(app):
    async def check(ready, channel):
        assert ready.adapter_ids == ("kjv",)
        assert (ready.device, ready.compute_dtype, ready.nf4_bytes) == ("cpu", "float32", 1000)
        assert ready.metrics_url.startswith("http://127.0.0.1:")
        kill()

    assert await run(app, check) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_idle_server_ends_with_status_0(app, number):
    async def check(ready, channel):
        kill(number)

    assert await run(app, check) == 0
    assert app.engine.log == ["start", "refuse", "drain 7", "stop"]


async def test_health_is_not_serving_while_requests_finish(app):
    async def check(ready, channel):
        call = GenerationServiceStub(channel).Generate(GenerateRequest(prompt="x"))
        await wait_for(lambda: app.engine.submitted)
        kill()
        await wait_for(lambda: "drain 7" in app.engine.log)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        app.engine.abort(app.engine.submitted[0].request_id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.CANCELLED

    assert await run(app, check) == 0


async def test_second_signal_cancels_what_still_runs(app):
    async def check(ready, channel):
        call = GenerationServiceStub(channel).Generate(GenerateRequest(prompt="x"))
        await wait_for(lambda: app.engine.submitted)
        kill()
        await wait_for(lambda: "drain 7" in app.engine.log)
        kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        await wait_for(lambda: app.engine.aborted)

    assert await run(app, check) == 1


async def test_dead_engine_ends_the_server_with_status_1(app):
    async def check(ready, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        step_thread = threading.Thread(target=app.engine.on_dead, args=(RuntimeError("CUDA error"),))
        step_thread.start()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()

    assert await run(app, check) == 1
    assert app.engine.log == ["start", "stop"]


async def test_port_in_use_stops_what_was_started(app):
    from lorikeet.server.errors import ConfigError

    async def check(ready, channel):
        port = int(ready.address.rpartition(":")[2])
        second = SimpleNamespace(**vars(app))
        second.config = ServerConfig(port=port, metrics=False)
        second.engine, second.manager = Engine(), Manager()
        with pytest.raises(ConfigError, match=str(port)):
            await serve_until_stopped(second, lambda ready: None)
        assert second.engine.log == ["start", "stop"]
        assert second.manager.log == [*app.manager.log, "close"]
        # The second server took the signal handlers away with it; end the first one by its engine.
        app.engine.on_dead(RuntimeError())

    assert await run(app, check) == 1
