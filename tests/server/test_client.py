"""The Python client against a server with fakes below, on a thread of its own."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from lorikeet.adapters.info import LoadOptions, Tier
from lorikeet.protos.v1 import adapters_pb2
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server.adapter_service import MAX_WAIT_S
from lorikeet.server.client import GenerateOptions, LorikeetClient, generate_request
from lorikeet.server.client import LoadOptions as ClientLoadOptions
from lorikeet.server.status import RemoteError

from .fake_manager import KJV, OLD_KJV


@pytest.fixture
def client(address):
    with LorikeetClient(address, timeout_s=60) as client:
        yield client


def test_options_are_the_fields_of_a_request():
    options = GenerateOptions.__annotations__.keys()
    nested = {*pb.Sampling.DESCRIPTOR.fields_by_name, *pb.Stopping.DESCRIPTOR.fields_by_name}
    assert options == {*pb.GenerateRequest.DESCRIPTOR.fields_by_name} - {"sampling", "stopping"} | nested


def test_options_of_a_load_are_the_fields_of_its_request():
    fields = set(adapters_pb2.LoadAdapterRequest.DESCRIPTOR.fields_by_name)
    assert ClientLoadOptions.__annotations__.keys() == fields - {"adapter_id", "path", "dry_run"}


def test_request_has_the_options_in_their_places():
    request = generate_request(
        messages=[("user", "hi")], adapter_id="kjv", max_tokens=5, temperature=0, seed=1, stop=["END"], ignore_eos=True,
        routing_key="user-7",
    )  # fmt: skip
    assert request == pb.GenerateRequest(
        messages=[pb.Message(role="user", content="hi")],
        adapter_id="kjv",
        routing_key="user-7",
        max_tokens=5,
        sampling=pb.Sampling(temperature=0, seed=1),
        stopping=pb.Stopping(stop=["END"], ignore_eos=True),
    )
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_generate_and_stream(client):
    assert client.generate(prompt="x", adapter_id="kjv").text == "Hello world"
    events = list(client.stream(prompt="x"))
    assert "".join(event.delta.text for event in events) == "Hello world"


def test_leaving_a_stream_cancels_it(client, engine):
    engine.script = lambda request: []
    for event in client.stream(prompt="x"):
        assert event.HasField("started")
        break
    assert engine.on_abort.wait(90)


class Recorder(grpc.GenericRpcHandler):
    """Answers every call with an empty message; notes its method and who called."""

    def __init__(self):
        self.calls = []

    def service(self, details):
        name = dict(details.invocation_metadata).get("x-lorikeet-client")
        self.calls.append((details.method.rpartition("/")[2], name))
        if details.method.endswith("Stream"):
            return grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b""]))
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


@pytest.fixture
def recorder():
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[recorder])
    recorder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield recorder
    server.stop(0).wait()


@pytest.mark.parametrize("name", ["team-a", ""])
def test_every_rpc_has_a_method_that_says_who_calls(recorder, name):
    with LorikeetClient(recorder.address, timeout_s=60, client_name=name) as client:
        client.generate(prompt="x")
        list(client.stream(prompt="x"))
        client.score(text="xy")
        client.tokenize("x")
        client.is_serving()
        client.load_adapter("a")
        client.unload_adapter("a")
        client.rollback_adapter("a")
        client.get_adapter("a")
        client.list_adapters()
        client.prefetch_adapter("a")
        client.pin_adapter("a")
        client.unpin_adapter("a")
        client.set_alias("a", "b")
        client.delete_alias("a")
        client.list_aliases()
    services = [adapters_pb2.DESCRIPTOR.services_by_name, pb.DESCRIPTOR.services_by_name]
    methods = {method.name for found in services for service in found.values() for method in service.methods}
    assert {method for method, _ in recorder.calls} == {*methods, "Check"}
    assert {client for _, client in recorder.calls} == {name or None}


def test_load_and_plan(client, manager):
    assert client.load_adapter("new").adapter_id == "new"
    response = client.plan_load("new", source="s3://b/x", expected_version="a" * 64, allow_zero=True)
    assert response.plan.fits_device
    assert response.adapter.adapter_id == "new"
    client.load_adapter("new", "folder", allow_other_base=True)
    assert [call[0] for call in manager.calls] == ["load", "plan_load", "load"]
    assert manager.calls[1][2:] == ("s3://b/x", LoadOptions(allow_zero=True, expected_digest="a" * 64))
    assert str(manager.calls[2][2]) == "folder"
    assert manager.calls[2][3] == LoadOptions(allow_other_base=True)


def test_look_at_adapters(client):
    assert client.get_adapter("kjv@0000").version == OLD_KJV.digest
    assert [version.version for version in client.describe_adapter("kjv").versions] == [KJV.digest, OLD_KJV.digest]
    assert [adapter.version for adapter in client.list_adapters()] == [KJV.digest, OLD_KJV.digest]
    client.unload_adapter("kjv")
    assert client.list_adapters() == []


def test_list_fetches_every_page(client, manager):
    manager.infos = [dataclasses.replace(KJV, adapter_id=f"a{number:03}") for number in range(250)]
    assert [adapter.adapter_id for adapter in client.list_adapters()] == [f"a{number:03}" for number in range(250)]
    assert [call[0] for call in manager.calls] == ["list"] * 3


def test_rollback(client, manager):
    assert client.rollback_adapter("kjv").version == OLD_KJV.digest
    client.rollback_adapter("kjv", "0000")
    assert manager.calls == [("rollback", "kjv", ""), ("rollback", "kjv", "0000")]


def test_tiers(client, manager):
    assert client.prefetch_adapter("kjv@dddd").tier == adapters_pb2.ADAPTER_TIER_DEVICE
    assert client.pin_adapter("kjv", "host").pinned_tier == adapters_pb2.ADAPTER_TIER_HOST
    assert client.unpin_adapter("kjv").pinned_tier == adapters_pb2.ADAPTER_TIER_UNSPECIFIED
    assert [call[:3] for call in manager.calls] == [
        ("prefetch", "kjv@dddd", Tier.DEVICE),
        ("pin", "kjv", Tier.HOST),
        ("unpin", "kjv"),
    ]
    assert manager.calls[0][3] < 60 < MAX_WAIT_S


def test_aliases(client, manager):
    alias = client.set_alias("prod", "kjv")
    assert [(target.version, target.weight) for target in alias.targets] == [(KJV.digest, 1.0)]
    client.set_alias("prod", {"kjv@dddd": 9, "kjv@0000": 1})
    client.set_alias("other", [("kjv", 2.5)])
    assert [alias.name for alias in client.list_aliases()] == ["other", "prod"]
    assert [target.weight for target in client.list_aliases()[1].targets] == [9, 1]
    client.delete_alias("other")
    assert [alias.name for alias in client.list_aliases()] == ["prod"]


def test_target_given_twice_is_refused_and_not_dropped_in_silence(client):
    with pytest.raises(RemoteError, match="name each version once"):
        client.set_alias("prod", [("kjv", 1), ("kjv", 2)])


def test_weight_0_does_not_become_1(client, manager):
    with pytest.raises(ValueError, match="leave a target out"):
        client.set_alias("prod", {"kjv@dddd": 1, "kjv@0000": 0})
    assert manager.calls == []


def test_health(client):
    assert client.is_serving()


@pytest.mark.parametrize("name", ["a b", "käse", "x" * 129, "a\n"])
def test_name_that_metadata_cannot_carry_is_refused(name):
    with pytest.raises(ValueError, match="no client name"):
        LorikeetClient(client_name=name)


def test_errors_are_typed(client):
    with pytest.raises(RemoteError) as caught:
        client.generate(prompt="x", adapter_id="nope")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    with pytest.raises(RemoteError, match="temperature is -1"):
        list(client.stream(prompt="x", temperature=-1))
