"""Kill -9 at any moment of a load, rollback, pin or alias loses nothing acknowledged and leaves nothing half-done."""

import copy
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from lorikeet.adapters.info import AdapterState

from . import restart_child
from .managing import check, digest_of, serve
from .restart_child import NUM_VARIANTS, SITES_FILE, Model, change_number, open_manager

ROUNDS = 4


def kill_at_random(rng, *arguments):
    """Run the child and SIGKILL it at a random moment; returns what it printed, line by line."""
    command = [sys.executable, "-P", restart_child.__file__, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        lines = [child.stdout.readline() for _ in range(rng.randrange(1, 60))]
        threading.Event().wait(rng.uniform(0, 0.02))
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL and all(lines), "the child ended by itself"
    # The manager logs to the same pipe.
    return [line.split() for line in lines if line.endswith("\n") and line.startswith(("begin", "done", "refused"))]


def found_in(manager):
    """The same as a Model."""
    saved = {adapter.adapter_id: adapter for adapter in manager._core.state.database.load().adapters}
    infos = {info.adapter_id: info for info in manager.list() if info.current}
    assert set(saved) == set(infos)
    adapters = {name: [info.digest, saved[name].previous, info.pinned] for name, info in infos.items()}
    aliases = {a.name: tuple((t.adapter_id, t.digest, t.weight) for t in a.targets) for a in manager.list_aliases()}
    return adapters, aliases


def check_whole(manager, state):
    """Everything that is remembered is served, and every kept version is what its name says."""
    check(manager)
    assert all(info.state is AdapterState.READY for info in manager.list())
    for directory in (state.path / "versions").iterdir():
        assert digest_of(directory) == directory.name
    assert os.listdir(state.incoming) == []
    references = {info.adapter_id for info in manager.list() if info.current}
    references |= {f"{t.adapter_id}@{t.digest}" for alias in manager.list_aliases() for t in alias.targets}
    for reference in references:
        serve(manager, reference)


@pytest.fixture
def variants(lora_dir, clone_adapter):
    """The folders that are loaded from."""
    folders = [clone_adapter(f"variants/v{i}", 1.0 + i) for i in range(NUM_VARIANTS)]
    shutil.rmtree(lora_dir)
    return folders


def test_every_acknowledged_change_is_there_after_a_kill(tmp_path, variants, sites):
    rng = random.Random()
    seed = rng.randrange(2**32)
    digests = [digest_of(folder) for folder in variants]
    (tmp_path / SITES_FILE).write_bytes(pickle.dumps((sites, digests)))
    model, number, done, rounds = Model(digests), 0, 0, 0
    while rounds < ROUNDS or done <= 2 * ROUNDS:  # each may have been killed after its first lines
        rounds += 1
        pending = None
        for word, at in kill_at_random(rng, tmp_path, seed, number):
            number = int(at)
            pending = number if word == "begin" else None
            if word == "done":
                model.apply(*change_number(seed, number, digests))
                done += 1
        manager, state = open_manager(tmp_path, sites)
        try:
            found = found_in(manager)
            if pending is not None and found != (model.adapters, model.aliases):
                model = copy.deepcopy(model)
                model.apply(*change_number(seed, pending, digests))  # then it has happened, as a whole
            assert found == (model.adapters, model.aliases), f"seed {seed}, change {number}"
            check_whole(manager, state)
        finally:
            manager.close()
            state.close()
        number += 1
