"""Helpers for tests of the adapter manager: what the step thread does, disks that stall or fail, what always holds."""

import hashlib
import os
import threading
import time
from concurrent.futures import Future

from lorikeet.adapters.packing import PackedAdapter
from lorikeet.adapters.rules import check_integrity

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATIENCE_S = 20.0

PLAIN_BYTES = 4 * 3 * (4 * (32 + 32) + 4 * (48 + 32))  # lora_dir: rank 4 on q_proj and down_proj of 3 layers, float32


def wait_until(condition, what, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        threading.Event().wait(0.002)


def start(function, *args, **kwargs):
    """Call it on a thread of its own; returns a future."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def activate(manager, version, seconds=PATIENCE_S):
    """What the step thread does for a waiting request: try between steps until the version is there."""
    slots = []

    def step():
        manager.step_work()
        slot = manager.try_activate(version)
        if slot is not None:
            slots.append(slot)
        return bool(slots)

    wait_until(step, f"{version} on the device", seconds)
    return slots[0]


def end(manager, version):
    manager.deactivate(version)
    manager.release(version)


def serve(manager, reference, routing_key=""):
    """A whole request; returns the version that it got."""
    version = manager.resolve(reference, routing_key)
    activate(manager, version)
    end(manager, version)
    return version


def slot_deltas(manager, slot, unpack):
    store = manager.store
    columns = [table[:, slot] for table in (store.site_offsets, store.site_ranks, store.site_affines)]
    tables = PackedAdapter(store.arena, columns[0], columns[1], None, columns[2])
    return unpack(tables, data=store.arena)


def digest_of(directory):
    """The version that a folder's content is."""
    return hashlib.sha256((directory / CONFIG).read_bytes() + (directory / WEIGHTS).read_bytes()).hexdigest()


def check(manager):
    """What must hold between any two calls."""
    with manager._changed:
        check_integrity(manager._registry)
        manager.store.check_integrity()


def checked(make_manager):
    """The fixture of that name, and every manager that it made is checked at the end of the test."""
    made = []

    def make(**overrides):
        made.append(make_manager(**overrides))
        return made[-1]

    yield make
    for manager in made:
        check(manager)


class Recorder:
    """An observer."""

    def __init__(self):
        self.loads, self.evictions = [], []

    def on_load(self, adapter_id, outcome, seconds):
        assert seconds >= 0
        self.loads.append((adapter_id, outcome))

    def on_evict(self, tier):
        self.evictions.append(tier)


class Gate:
    """Holds threads up until it is opened, at the latest at the end of its `with`."""

    def __init__(self):
        self._reached, self._open = threading.Event(), threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()

    def pass_through(self):
        self._reached.set()
        assert self._open.wait(3 * PATIENCE_S), "the gate was never opened"

    def wait_reached(self):
        assert self._reached.wait(PATIENCE_S), "nobody came to the gate"

    def open(self):
        self._open.set()


def watch_reads(monkeypatch, before_read):
    """before_read(path, thread_name) is called before every read of a weights file; it may wait or raise OSError."""
    readv = os.readv

    def read(descriptor, buffers):
        before_read(os.readlink(f"/proc/self/fd/{descriptor}"), threading.current_thread().name)
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", read)


def watch_opens(monkeypatch, before_open):
    """before_open(path) is called before every os.open."""
    opens = os.open

    def watched(path, *args, **kwargs):
        before_open(os.fspath(path))
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)


def stall_reads(monkeypatch, part, threads="adapter-"):
    """Reads of weights files whose path has this part, by threads of such names, wait at the gate that is returned."""
    gate = Gate()

    def stall(path, thread):
        if part in path and thread.startswith(threads):
            gate.pass_through()

    watch_reads(monkeypatch, stall)
    return gate
