"""What the process of a merge does, in this process: its lines, what it refuses, and how it ends; a real one last."""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lorikeet.adapters.errors import ServingError
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.server import merge_process, merge_worker
from lorikeet.server.base.base_hash import identify_base
from lorikeet.server.base.checkpoint import BaseCheckpoint
from lorikeet.server.config import ServerConfig
from lorikeet.server.merge_command import CALIBRATION_FILE, REQUEST_FILE, MergeCommand
from lorikeet.server.merge_operations import MergeOperation
from lorikeet.server.merge_process import MergeRunner

from ..tiny import TEXT


class Lines:
    """A channel that keeps what is sent."""

    def __init__(self):
        self.sent = []

    def write(self, line):
        self.sent.append(json.loads(line))

    def flush(self):
        pass


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("LORIKEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(merge_worker, "lean_imports", contextlib.nullcontext)  # all has been imported


@pytest.fixture
def command(tiny_model, tiny_adapters, tmp_path) -> MergeCommand:
    work, merged = tmp_path / "work", tmp_path / "merged"
    shutil.copytree(tiny_adapters / "amber", work / "0" / "amber")
    merged.mkdir()
    base = identify_base(str(tiny_model), "", tiny_model, BaseCheckpoint(tiny_model))
    return MergeCommand(
        work=work, model=str(tiny_model), base_sha256=base.sha256, base_names=(), adapters=(work / "0" / "amber",),
        weights=(1.0,), onto=None, to=Target.BF16, out=merged / "out", has_calibration=False, iterations=20, texts=(),
        accept_loss=False, allow_other_base=False, adapter_bytes=2**20, threads=1, priority="normal",
    )  # fmt: skip


def run(command: MergeCommand, stop: merge_worker._Stop | None = None) -> tuple[dict, list[dict]]:
    lines = Lines()
    done = merge_worker._merge(command, stop or merge_worker._Stop(), merge_worker._Channel(lines))
    return done, [line["progress"] for line in lines.sent]


def refusal(command: MergeCommand) -> dict:
    with pytest.raises(ServingError) as caught:
        run(command)
    assert list(command.out.parent.iterdir()) == []
    said = merge_worker._described(caught.value, command)
    assert not any(str(path) in json.dumps(said) for path in (command.work.parent, Path(command.model)))
    return said


def test_a_command_is_read_as_it_was_written(command):
    command = dataclasses.replace(command, onto=Onto.ORIGINAL, texts=("a", "b"), base_names=("org/x",))
    command.write()
    assert MergeCommand.from_json(json.loads((command.work / REQUEST_FILE).read_bytes())) == command


def test_a_compared_merge_tells_how_far_it_is_and_reports_what_it_measured(command):
    done, told = run(dataclasses.replace(command, texts=("\n\n".join(TEXT * 4),), accept_loss=True))
    stages = list(dict.fromkeys(line["stage"] for line in told))
    assert stages == ["Reading adapters", "Merging onto nf4", "Loading models to compare", "Comparing"]
    for stage, unit in (("Merging onto nf4", "bytes"), ("Comparing", "tokens")):
        of = [line for line in told if line["stage"] == stage]
        assert [line["done"] for line in of] == sorted(line["done"] for line in of)
        assert of[-1]["done"] == of[-1]["total"] > 0 and {line["unit"] for line in of} == {unit}
    written = json.loads((command.out / "merge_report.json").read_text())
    assert {name: done[name] for name in written} == written
    assert done["output"] == "out" and "unmerged on NF4" in done["table"] and done["weight_bytes"] > 2**19


def test_what_cannot_be_merged_is_refused_in_the_client_s_words(command, monkeypatch):
    other = dataclasses.replace(command, base_sha256="ab" * 32)
    assert refusal(other)["reason"] == "BASE_MODEL"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    short = dataclasses.replace(command, to=Target.AWQ, has_calibration=True)
    (command.work / CALIBRATION_FILE).write_text("too short")
    said = refusal(short)
    assert (said["code"], said["reason"]) == ("INVALID_ARGUMENT", "CONFIG") and "too short" in said["message"]

    said = refusal(dataclasses.replace(command, texts=("few words",)))
    assert (said["code"], said["reason"]) == ("INVALID_ARGUMENT", "TEXT_TOO_SHORT")
    assert said["metadata"]["field"] == "texts"

    card = command.adapters[0] / "README.md"
    card.write_text(f"---\nbase_model_sha256: {'ab' * 32}\n---\n")
    assert refusal(command)["reason"] == "ADAPTER_INCOMPATIBLE"
    done, _ = run(dataclasses.replace(command, allow_other_base=True))
    assert "abab" in done["warnings"][0]


def test_without_16_bit_weights_there_is_no_merge_onto_them(command, tmp_path):
    run(dataclasses.replace(command, to=Target.NF4, out=tmp_path / "nf4"))
    base = identify_base("", "", tmp_path / "nf4", BaseCheckpoint(tmp_path / "nf4"))
    quantized = dataclasses.replace(command, model=str(tmp_path / "nf4"), base_sha256=base.sha256, onto=Onto.ORIGINAL)
    said = refusal(quantized)
    assert (said["code"], said["reason"]) == ("FAILED_PRECONDITION", "MERGE_REFUSED")
    assert "16-bit" in said["message"] and "onto nf4" in said["message"] and "--onto" not in said["message"]


def test_a_disk_that_fills_up_is_named(command):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        said = refusal(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (said["code"], said["reason"]) == ("RESOURCE_EXHAUSTED", "MERGE_DISK")


def test_it_is_stopped_while_it_writes_and_while_it_compares(command):
    class Stopping(Lines):
        def __init__(self, stage, stop):
            super().__init__()
            self.stage, self.stop = stage, stop

        def write(self, line):
            super().write(line)
            if self.sent[-1]["progress"]["stage"].startswith(self.stage):
                self.stop.on_signal(signal.SIGTERM, None)

    for stage, texts, error in (
        ("Merging", (), ServingError),
        ("Comparing", ("\n\n".join(TEXT * 4),), merge_worker._StoppedError),
        ("Reading", (), merge_worker._StoppedError),
    ):
        stop = merge_worker._Stop()
        channel = merge_worker._Channel(Stopping(stage, stop))
        with pytest.raises(error):
            merge_worker._merge(dataclasses.replace(command, texts=texts), stop, channel)
        assert list(command.out.parent.iterdir()) == []


def test_fields_stand_for_flags_in_messages(command):
    told = merge_worker._public(f"give --accept-loss, --out or --text; --model {command.model}", command)
    assert told == f"give accept_loss, output or texts; --model {Path(command.model).name}"


# In a process of its own.


@pytest.mark.parametrize(
    ("priority", "found"),
    [
        ("idle", (os.SCHED_IDLE, 19)),
        ("low", (os.SCHED_OTHER, 19)),
        ("normal", (os.SCHED_OTHER, os.nice(0))),
    ],
    ids=["idle", "low", "normal"],
)
def test_it_leaves_the_cores_to_others(priority, found):
    program = (
        f"import os\nfrom lorikeet.server.merge_worker import set_priority\nset_priority({priority!r})\n"
        "print(os.sched_getscheduler(0), os.nice(0))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(value) for value in found], done.stderr


@pytest.fixture
def long_command(command) -> MergeCommand:
    """Compared on so much text that it has not ended, however late it is stopped."""
    return dataclasses.replace(command, texts=("\n\n".join(TEXT * 3000),))


def operation_of(command: MergeCommand) -> MergeOperation:
    command.write()
    return MergeOperation(1, "operations/x", command.out.name, (), frozenset(), command, "r")


def cancel_when_told(runner: MergeRunner, command: MergeCommand) -> MergeOperation:
    """Run a merge and cancel it as soon as its process says something."""

    async def run() -> MergeOperation:
        operation = operation_of(command)
        operation.observe = lambda share: operation.cancelled.set()
        with pytest.raises(ServingError, match="cancelled"):
            await runner(operation)
        return operation

    return asyncio.run(run())


def wait_for_end(pid: int) -> None:
    """Wait until a process that is nobody's child of ours has ended; a zombie has."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_process_is_cancelled(long_command, tmp_path):
    cancel_when_told(MergeRunner(ServerConfig(cache_dir=tmp_path / "cache")), long_command)
    assert list(long_command.out.parent.iterdir()) == []


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-P", "-m", "lorikeet.server.merge_worker", sys.argv[1]],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
print(child.pid, child.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


def test_a_process_ends_when_its_server_is_killed(long_command):
    long_command.write()
    arguments = [sys.executable, "-P", "-c", PARENT, str(long_command.work)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, _, line = parent.stdout.readline().partition(" ")
        assert json.loads(line)["progress"]["stage"] == "Starting"
        parent.kill()
    wait_for_end(int(pid))
    assert list(long_command.out.parent.iterdir()) == []


def test_a_process_that_will_not_end_is_killed_with_what_it_left(command, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\nmkdir {command.out.parent}/.out.merging-01234567\nsleep 600 & echo $! > {tmp_path}/pid\n"
        'echo \'{"progress": {"stage": "Stuck", "done": 0, "total": 0, "unit": ""}}\'\nwait\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(merge_process.sys, "executable", str(script))
    monkeypatch.setattr(merge_process, "CLEAN_UP_S", 0.1)
    monkeypatch.setattr(merge_process, "_MORE_S", 0.1)
    operation = cancel_when_told(MergeRunner(ServerConfig(cache_dir=tmp_path / "cache")), command)
    assert operation.stage == "Stuck"
    assert list(command.out.parent.iterdir()) == []
    wait_for_end(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        ("", 1, "log has the details"),
        ("kill -9 $$", 0, "memory was full"),
        ("echo not json", 0, "Expecting value"),
    ],
)
def test_a_process_that_ends_by_itself_is_explained(lines, status, said, command, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{lines}\nexit {status}\n")
    script.chmod(0o700)
    monkeypatch.setattr(merge_process.sys, "executable", str(script))
    runner = MergeRunner(ServerConfig(cache_dir=tmp_path / "cache"))
    with pytest.raises(Exception, match=said):
        asyncio.run(runner(operation_of(command)))
