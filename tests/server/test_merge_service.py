"""MergeService and its operations over real gRPC, with merges that are played: what is asked, refused, remembered."""

import asyncio
import math
import threading
from contextlib import asynccontextmanager

import pytest
from google.longrunning import operations_pb2 as lro
from google.longrunning.operations_pb2_grpc import OperationsStub
from lorikeet.adapters.carried_text import CARRIED_FILE
from lorikeet.adapters.info import AliasInfo, AliasTarget
from lorikeet.adapters.merge.errors import MergeDiskError
from lorikeet.adapters.merge.staging import staged
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.protos.v1 import merges_pb2 as pb
from lorikeet.protos.v1.merges_pb2_grpc import MergeServiceStub
from lorikeet.server import merge_operations
from lorikeet.server.client_merges import progress_of, report_of
from lorikeet.server.errors import DrainingError
from lorikeet.server.interceptors import current_request_id
from lorikeet.server.status import operation_error

from .fake_manager import KJV, OLD_KJV, FakeManager
from .fake_merges import FakeMerges
from .fakes import OnlyAccess, error_of, serve, wait_for


@pytest.fixture
def merges(tmp_path):
    directory = tmp_path / "merged"
    directory.mkdir()
    return FakeMerges({"merge_dir": directory, "merge_max_queued": 1}, scratch=tmp_path / "scratch")


class Stubs:
    def __init__(self, channel):
        self._merges, self._operations = MergeServiceStub(channel), OperationsStub(channel)

    async def start(self, *references, output="out", **fields):
        members = [pb.MergeMember(adapter_id=reference) for reference in references or ("kjv",)]
        fields = {"adapters": members, "unverified": True} | fields
        return await self._merges.MergeAdapter(pb.MergeAdapterRequest(output=output, **fields))

    def __getattr__(self, method):
        def call(name="", **fields):
            return getattr(self._operations, method)(getattr(lro, f"{method}Request")(name=name, **fields))

        return call

    async def ended(self, name):
        return await self.WaitOperation(name)


@asynccontextmanager
async def stubs(merges, manager=None, access=None):
    async with serve(manager, access=access, merges=merges) as (_, channel, _):
        yield Stubs(channel)


async def test_a_merge_has_what_was_asked_for_and_answers_with_its_report(merges):
    manager = FakeManager()
    async with stubs(merges, manager) as calls:
        operation = await calls.start(
            adapters=[pb.MergeMember(adapter_id="kjv", weight=-0.5), pb.MergeMember(adapter_id="kjv@0000")],
            onto=pb.MERGE_ONTO_ORIGINAL, to=pb.MERGE_TARGET_AWQ, calibration="some text", iterations=7,
            texts=["held out", " ", "more"], unverified=False, accept_loss=True, allow_other_base=True,
        )  # fmt: skip
        assert not operation.done
        await wait_for(lambda: merges.commands)
        running = progress_of(await calls.GetOperation(operation.name))
        merges.go.set()
        done = await calls.ended(operation.name)
    [command] = merges.commands
    assert (command.onto, command.to, command.iterations) == (Onto.ORIGINAL, Target.AWQ, 7)
    assert command.weights == (-0.5, 1.0) and command.texts == ("held out", "more")
    assert command.accept_loss and command.allow_other_base and command.has_calibration
    assert command.base_sha256 == "b" * 64 and command.model == "demo"
    assert [directory.name for directory in command.adapters] == ["kjv", "kjv"]
    assert len(set(command.adapters)) == 2 and all(d.is_relative_to(command.work) for d in command.adapters)
    assert (running.state, running.stage, running.done, running.total, running.unit) == (
        pb.MERGE_STATE_RUNNING, "Merging onto nf4", 1, 4, "bytes",
    )  # fmt: skip
    assert [(a.id, a.version, a.weight) for a in running.adapters] == [
        ("kjv", KJV.digest, -0.5), ("kjv", OLD_KJV.digest, 1.0),
    ]  # fmt: skip
    report, progress = report_of(done), progress_of(done)
    assert (report.output, report.onto, report.table, list(report.warnings)) == ("out", "nf4", "a table", ["mind"])
    assert not report.comparison.base.perplexity.HasField("value") and report.comparison.gain_kept == 0.9
    assert not report.comparison.base.HasField("divergence")
    assert progress.state == pb.MERGE_STATE_SUCCEEDED
    times = [t.ToMicroseconds() for t in (progress.create_time, progress.start_time, progress.end_time)]
    assert times == sorted(times) and times[0] > 0
    assert manager.held == [] and merges.seen[-2:] == ["ok", (0, 0)]
    await wait_for(lambda: not any(merges.scratch.iterdir()))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"adapters": []}, "adapters"),
        ({"adapters": [pb.MergeMember(adapter_id="kjv")] * 9}, "adapters"),
        ({"adapters": [pb.MergeMember(adapter_id="../kjv")]}, "adapters[0].adapter_id"),
        ({"adapters": [pb.MergeMember(adapter_id="kjv", weight=math.inf)]}, "adapters[0].weight"),
        ({"output": ""}, "output"),
        ({"output": ".."}, "output"),
        ({"output": "a/b"}, "output"),
        ({"output": ".hidden"}, "output"),
        ({"to": 99}, "to"),
        ({"onto": 99}, "onto"),
        ({"iterations": 1001}, "iterations"),
        ({"to": pb.MERGE_TARGET_GPTQ}, "calibration"),
        ({"calibration": "text"}, "calibration"),
        ({"unverified": False}, "texts"),
        ({"texts": ["text"]}, "texts"),
    ],
)
async def test_a_message_that_cannot_be_meant_is_refused_by_field(fields, field, merges):
    async with stubs(merges) as calls:
        error = await error_of(calls.start(**fields))
    assert error.code == "INVALID_ARGUMENT" and error.metadata["field"] == field
    assert not merges.commands


async def test_what_is_not_there_or_in_the_way_is_said_at_once(merges, tmp_path):
    (tmp_path / "merged" / "taken").mkdir()
    manager = FakeManager()
    targets = tuple(AliasTarget("kjv", info.digest, 1.0) for info in (KJV, OLD_KJV))
    manager.aliases = {"two": AliasInfo("two", targets), "one": AliasInfo("one", targets[1:])}
    async with stubs(merges, manager) as calls:
        for references, fields, expected in (
            (["nobody"], {}, ("NOT_FOUND", "ADAPTER_NOT_FOUND")),
            (["kjv@ffff"], {}, ("NOT_FOUND", "ADAPTER_NOT_FOUND")),
            (["two"], {}, ("INVALID_ARGUMENT", "ADAPTER_ID_INVALID")),
            (["kjv"], {"output": "taken"}, ("ALREADY_EXISTS", "MERGE_OUTPUT_EXISTS")),
            (["kjv"], {"to": pb.MERGE_TARGET_NF4}, ("FAILED_PRECONDITION", "MERGE_LOSS")),
        ):
            error = await error_of(calls.start(*references, **fields))
            assert (error.code, error.reason) == expected
            assert str(tmp_path) not in error.message
        merges.go.set()
        one = progress_of(await calls.start("one"))
    assert [a.version for a in one.adapters] == [OLD_KJV.digest]
    assert manager.held == []


async def test_what_an_adapter_carries_is_calibrated_on_unless_text_is_given(merges):
    manager = FakeManager()
    copy = manager.copy_files
    async with stubs(merges, manager) as calls:
        error = await error_of(calls.start(to=pb.MERGE_TARGET_AWQ))
        assert error.metadata["field"] == "calibration" and CARRIED_FILE in error.message

        def carry(version, target):
            copy(version, target)
            (target / CARRIED_FILE).write_text("carried")

        manager.copy_files = carry
        merges.go.set()
        await calls.ended((await calls.start(to=pb.MERGE_TARGET_AWQ)).name)
        await calls.ended((await calls.start(to=pb.MERGE_TARGET_GPTQ, output="b", calibration="given")).name)
    assert [command.has_calibration for command in merges.commands] == [False, True]
    assert manager.held == []


async def test_a_server_that_was_not_told_where_says_what_to_set():
    async with stubs(FakeMerges()) as calls:
        error = await error_of(calls.start())
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MERGE_NOT_CONFIGURED")
    assert "--merge-dir" in error.message


async def test_one_runs_and_so_many_wait(merges):
    async with stubs(merges) as calls:
        first = await calls.start(output="a")
        await wait_for(lambda: merges.commands)
        second = await calls.start(output="b")
        assert progress_of(second).state == pb.MERGE_STATE_QUEUED
        for output, reason in (("b", "MERGE_OUTPUT_EXISTS"), ("c", "MERGE_QUEUE_FULL")):
            assert (await error_of(calls.start(output=output))).reason == reason
        await calls.CancelOperation(second.name)
        cancelled = await calls.ended(second.name)
        third = await calls.start(output="b")
        merges.go.set()
        for operation in (first, third):
            assert (await calls.ended(operation.name)).HasField("response")
    assert operation_error(cancelled.error).reason == "MERGE_CANCELLED"
    assert [command.out.name for command in merges.commands] == ["a", "b"]


async def test_what_runs_is_cancelled_and_what_has_ended_stays_as_it_is(merges, tmp_path):
    async with stubs(merges) as calls:
        operation = await calls.start()
        await wait_for(lambda: merges.commands)
        assert (await error_of(calls.DeleteOperation(operation.name))).reason == "OPERATION_NOT_DONE"
        await calls.CancelOperation(operation.name)
        done = await calls.ended(operation.name)
        error = operation_error(done.error)
        assert (error.code, error.reason, done.done) == ("CANCELLED", "MERGE_CANCELLED", True)
        assert error.request_id and progress_of(done).state == pb.MERGE_STATE_CANCELLED
        await calls.CancelOperation(operation.name)
        assert (await calls.GetOperation(operation.name)) == done
        await calls.DeleteOperation(operation.name)
        error = await error_of(calls.GetOperation(operation.name))
        assert (error.code, error.reason) == ("NOT_FOUND", "OPERATION_NOT_FOUND")
    assert list((tmp_path / "merged").iterdir()) == []


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        (MergeDiskError("The disk is full."), ("RESOURCE_EXHAUSTED", "MERGE_DISK", "The disk is full.")),
        (ValueError("secret"), ("INTERNAL", "INTERNAL", "log")),
    ],
)
async def test_a_merge_that_fails_says_why_and_the_next_one_runs(fail, expected, merges):
    merges.fail = fail
    merges.go.set()
    async with stubs(merges) as calls:
        operation = await calls.ended((await calls.start()).name)
        error = operation_error(operation.error)
        assert (error.code, error.reason) == expected[:2] and expected[2] in error.message
        assert "secret" not in error.message
        merges.fail = None
        assert (await calls.ended((await calls.start()).name)).HasField("response")


async def test_the_list_has_pages_and_only_so_many_that_have_ended(merges, monkeypatch):
    monkeypatch.setattr(merge_operations, "MAX_KEPT", 3)
    merges.go.set()
    async with stubs(merges) as calls:
        names = [(await calls.ended((await calls.start(output=f"o{i}")).name)).name for i in range(4)]
        page = await calls.ListOperations("operations", page_size=2)
        rest = await calls.ListOperations("operations", page_size=2, page_token=page.next_page_token)
        assert [o.name for o in (*page.operations, *rest.operations)] == names[1:]
        assert not rest.next_page_token
        for fields in ({"name": "models"}, {"filter": "done"}, {"page_size": -1}):
            assert (await error_of(calls.ListOperations(**fields))).code == "INVALID_ARGUMENT"
        monkeypatch.setattr(merge_operations, "KEPT_S", -1)
        assert not (await calls.ListOperations("")).operations


async def test_waiting_ends_when_its_time_is_over(merges):
    async with stubs(merges) as calls:
        operation = await calls.start()
        waiting = await calls.WaitOperation(operation.name, timeout={"nanos": 20_000_000})
        assert not waiting.done
        assert (await error_of(calls.WaitOperation("operations/none"))).code == "NOT_FOUND"


async def test_only_who_manages_all_adapters_may_merge_and_knows_of_it(merges):
    manager = FakeManager()
    manager.aliases = {"mine": AliasInfo("mine", (AliasTarget("kjv", KJV.digest, 1.0),))}
    access = OnlyAccess(manages=["mine"], sees=["kjv"])
    async with stubs(merges, manager, access) as calls:
        for reference in ("kjv", "nobody", "mine"):
            error = await error_of(calls.start(reference))
            assert (error.code, error.reason) == ("PERMISSION_DENIED", "CLIENT_NOT_ALLOWED")
        access.sees = []
        assert (await error_of(calls.start("mine"))).reason == "ADAPTER_NOT_FOUND"
        assert not any(call[0] == "copy_files" for call in manager.calls) and manager.held == []
        access.manages, access.sees = ["mine", "kjv"], ["kjv"]
        operation = await calls.start("mine")
        assert len((await calls.ListOperations("")).operations) == 1
        access.manages = ["mine"]
        for method in ("GetOperation", "CancelOperation", "DeleteOperation", "WaitOperation"):
            assert (await error_of(getattr(calls, method)(operation.name))).reason == "OPERATION_NOT_FOUND"
        assert not (await calls.ListOperations("")).operations


async def test_a_call_that_is_given_up_while_files_are_copied_leaves_nothing(merges):
    manager = FakeManager()
    gate = manager.gates["copy_files"] = threading.Event()
    service = merges.service(manager)
    current_request_id.set("r")
    request = pb.MergeAdapterRequest(adapters=[{"adapter_id": "kjv"}], output="a", unverified=True)
    call = asyncio.ensure_future(service.MergeAdapter(request, None))
    await wait_for(lambda: any(each[0] == "copy_files" for each in manager.calls))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    await wait_for(lambda: service.operations.all() and service.operations.all()[0].is_over)
    assert service.operations.all()[0].error.reason == "MERGE_CANCELLED" and manager.held == []
    await service.close()


async def test_a_copy_that_fails_leaves_nothing(merges):
    manager = FakeManager()
    copy = manager.copy_files

    def fill_up(version, target):
        copy(version, target)
        raise OSError(28, "No space left on device")

    manager.copy_files = fill_up
    async with stubs(merges, manager) as calls:
        error = await error_of(calls.start())
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "MERGE_DISK")
        await wait_for(lambda: not any(merges.scratch.iterdir()))
    assert manager.held == []


async def test_a_server_that_stops_ends_what_runs_and_what_waits(merges):
    service = merges.service(FakeManager())
    request = [pb.MergeAdapterRequest(adapters=[{"adapter_id": "kjv"}], output=o, unverified=True) for o in "ab"]
    current_request_id.set("r")
    for each in request:
        await service.MergeAdapter(each, None)
    await wait_for(lambda: merges.commands)
    service.stop()
    with pytest.raises(DrainingError):
        await service.MergeAdapter(request[0], None)
    await service.close()
    assert [type(operation.error) for operation in service.operations.all()] == [DrainingError] * 2
    assert "stopped while it merged" in service.operations.all()[0].error.message


async def test_what_a_killed_server_left_is_removed_at_the_next_start(merges, tmp_path):
    left = tmp_path / "merged" / ".out.merging-01234567"
    left.mkdir()
    (tmp_path / "merged" / "kept").mkdir()
    with staged(tmp_path / "merged" / "other") as living:
        merges.service(FakeManager()).clear_leftovers()
        assert living.is_dir() and not left.exists()
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["kept", "other"]


def test_every_target_and_state_has_a_value_in_the_proto():
    assert {f"MERGE_TARGET_{target.name}" for target in Target} == set(pb.MergeTarget.keys()[1:])
    assert {f"MERGE_ONTO_{onto.name}" for onto in Onto} == set(pb.MergeOnto.keys()[1:])
    assert {f"MERGE_STATE_{s.name}" for s in merge_operations.MergeState} == set(pb.MergeState.keys()[1:])
