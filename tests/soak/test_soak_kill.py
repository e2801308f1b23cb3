"""A real server is killed with SIGKILL at random moments, again and again: nothing that it acknowledged is lost."""

import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from lorikeet.server.client import LorikeetClient

from ..server.conftest import COMMON
from ..server.process import ServerProcess, lorikeet
from .contents import Content, place
from .durations import KILL_S
from .kill_clients import Asker, KillTally, Manager
from .references import References

MIN_ROUNDS = 2
# How long clients work before the kill.
WORK_S = (0.2, 3.0)
# Beyond what a start takes: a server that is killed while it starts.
START_S = 12.0


def make_managers(root: Path, contents: list[Content], seed: int, tally: KillTally) -> list[Manager]:
    """Two clients, each with a watched folder among its ids."""
    managers = []
    for i in range(2):
        folders = {f"k{i}-folder": contents[i]}
        for name, content in folders.items():
            place(content, root / name)
        managers.append(
            Manager(
                root,
                contents,
                ids=[*folders, f"k{i}-a", f"k{i}-b"],
                aliases=[f"k{i}-prod", f"k{i}-canary"],
                folders=folders,
                seed=f"{seed}/manager-{i}",
                tally=tally,
            )
        )
    return managers


def kill_while_it_starts(arguments: list[str], rng: random.Random) -> None:
    """Before, during or after it restores."""
    with subprocess.Popen(
        lorikeet("serve", "--port", "0", "--metrics-port", "0", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    ) as process:
        time.sleep(rng.uniform(0, START_S))
        process.kill()


def work_until_killed(server: ServerProcess, workers: list[Manager | Asker], rng: random.Random) -> None:
    """All clients at once, and then none has a server."""
    threads = [threading.Thread(target=worker.work, args=(server.address,)) for worker in workers]
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(*WORK_S))
    server.kill()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a client waits for a server that is gone"


@pytest.mark.timeout(KILL_S + 300)
def test_killed_server_knows_what_it_acknowledged(
    tiny_model: Path, tmp_path: Path, soak_contents: list[Content], soak_references: References, soak_seed: int
) -> None:
    rng, tally = random.Random(f"{soak_seed}/kill"), KillTally()
    root, state, cache, log = (tmp_path / name for name in ("adapters", "state", "cache", "log"))
    shutil.copytree(soak_contents[0].directory.parent, root / ".staged")
    managers = make_managers(root, soak_contents, soak_seed, tally)
    names = [name for manager in managers for name in manager.names]
    askers = [Asker(names, soak_references, f"{soak_seed}/asker-{i}", tally) for i in range(2)]
    arguments = ["--model", str(tiny_model), "--cache-dir", str(cache), "--adapters", str(root)]
    arguments += ["--state-dir", str(state), "--kv-cache-bytes", "8MiB", "--log-level", "warning", *COMMON]

    began = time.monotonic()
    rounds = 0
    while rounds < MIN_ROUNDS or time.monotonic() - began < KILL_S:
        if rounds >= MIN_ROUNDS and rng.random() < 0.3:
            kill_while_it_starts(arguments, rng)
            tally.count("killed while it started")
        server = ServerProcess(arguments, log)
        check_all(server, managers, tally, log)
        work_until_killed(server, [*managers, *askers], rng)
        for path in root.glob(".moving-*"):
            if rng.random() < 0.5:
                shutil.rmtree(path)
        rounds += 1
        print(
            f"kill {time.monotonic() - began:6.0f} s, round {rounds}: {dict(sorted(tally.counts.items()))}", flush=True
        )
        assert tally.problems == []

    server = ServerProcess(arguments, log)
    try:
        check_all(server, managers, tally, log)
        server.terminate()
        assert server.wait() == 0, log.read_text()[-4000:]
    finally:
        server.kill()
    assert os.listdir(state / "incoming") == []
    assert {path.name for path in (state / "versions").iterdir()} <= {content.digest for content in soak_contents}


def check_all(server: ServerProcess, managers: list[Manager], tally: KillTally, log: Path) -> None:
    """What was acknowledged before is so again, when the first start has found the folders."""
    with LorikeetClient(server.address, timeout_s=60) as client:
        for manager in managers:
            manager.check(client)
    if tally.problems:
        server.kill()
    assert tally.problems == [], log.read_text()[-4000:]
