"""What 10 to 10,000 known adapters cost a request: `python benchmarks/registry_scale.py`, some minutes, no model.

An adapter manager over a base of one tiny linear knows so many adapters, loaded from as many folders; a few of them are
on the device. Timed are the calls that every request makes, each of which takes the manager's lock: `resolve` and
`release`, `try_activate` and `deactivate`. Then the same of the step thread's while another thread calls `snapshot`, as
a scrape of the metrics does, without pause: that is the worst that a listing of everything can do to a step.

Numbers of adapters take turns in rounds. Prints ratios first and writes JSON and a plot.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bar_panels import Panel, write_result
from lorikeet.adapters.config import CONFIG_FILE
from lorikeet.adapters.fingerprint import BaseFingerprint
from lorikeet.adapters.info import Tier
from lorikeet.adapters.manager import AdapterManager
from lorikeet.adapters.modules import Module, ModuleKind, ModuleTable
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.adapters.state.state_dir import open_state_dir
from lorikeet.adapters.version import AdapterVersion
from lorikeet.adapters.weights_file import WEIGHTS_FILE
from lorikeet.server.logs import configure_logs
from machine import describe_machine, one_line
from measurement import Spread, ratio
from options import parse_or_quick, parser_of
from safetensors.torch import save
from torch import Tensor

SEED = 7
MODULE, WIDTH, RANK = "model.layers.0.mlp.up_proj", 8, 1
RESIDENT = 32
MEMORY_BYTES = 2**20
QUICK = {"adapters": [3, 20], "calls": 200, "rounds": 1}
CALLS = {
    "resolve": "resolve + release, us",
    "activate": "try_activate + deactivate, us",
    "beside": "the same beside snapshots, p99.9, us",
    "snapshot": "snapshot, ms",
}
Measured = dict[str, list[float]]


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    configure_logs("error", "console")
    torch.set_num_threads(1)
    machine = describe_machine()
    measured: dict[int, Measured] = {number: {name: [] for name in CALLS} for number in options.adapters}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = (Path(scratch) / "adapters").resolve()
        ids = write_tiny_adapters(folder, max(options.adapters))
        managers: dict[int, tuple[AdapterManager, list[str]]] = {}
        for number in options.adapters:
            manager = stack.enter_context(manager_of(folder, ids[:number], Path(scratch) / f"state-{number}"))
            resident = ids[: min(RESIDENT, number)]
            for name in resident:
                manager.prefetch(name, Tier.DEVICE)
            managers[number] = manager, resident
            sys.stderr.write(f"  {number} adapters are known\n")
        for turn in range(-1, options.rounds):
            for number, (manager, resident) in managers.items():
                found = measure(manager, ids[:number], resident, options.calls)
                if turn >= 0:
                    for name, value in found.items():
                        measured[number][name].append(value)
    report(options, machine, measured)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "out", "quick")
    add = parser.add_argument
    add("--adapters", type=int, nargs="+", default=[10, 1000, 10000], help="known adapters [10 1000 10000]")
    add("--calls", type=int, default=20000, help="of each kind in a round [20000]")
    add("--rounds", type=int, default=5, help="times that every number of adapters is measured [5]")
    return parse_or_quick(parser, QUICK)


def write_tiny_adapters(folder: Path, count: int) -> list[str]:
    """Adapters of a few bytes for the tiny base, each with other content; returns their ids."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up_proj"]}
    names = [f"adapter-{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        directory = folder / name
        directory.mkdir(parents=True)
        lora_a = torch.full((RANK, WIDTH), float(i + 1))
        tensors = {f"{MODULE}.lora_A.weight": lora_a, f"{MODULE}.lora_B.weight": torch.ones(WIDTH, RANK)}
        (directory / WEIGHTS_FILE).write_bytes(save(tensors))
        (directory / CONFIG_FILE).write_text(json.dumps(config))
    return names


class NoWeights:
    """Of a base whose adapters are plain LoRA, which asks nothing of them."""

    def column_norms(self, module: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """DoRA would."""
        raise NotImplementedError

    def bias(self, module: str) -> Tensor | None:
        """Trained biases would."""
        raise NotImplementedError

    def equals(self, module: str, parameter: str, tensor: Tensor) -> bool:
        """Saved embeddings would."""
        raise NotImplementedError


@contextlib.contextmanager
def manager_of(folder: Path, ids: list[str], state_dir: Path) -> Iterator[AdapterManager]:
    """A started manager that has loaded these adapters from their folders, and keeps no copies of the files."""
    state = open_state_dir(state_dir, state_dir.parent, 0)
    site = Site(0, MODULE, 0, WIDTH, (Slice(MODULE, WIDTH),))
    embedding = Module("embed_tokens", ModuleKind.EMBEDDING, {"weight": (1, WIDTH)})
    manager = AdapterManager(
        SiteTable([site]),
        ModuleTable({embedding.path: embedding}, embedding.path, "lm_head", is_tied=False, vocab_size=1),
        NoWeights(),
        BaseFingerprint(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        device_budget_bytes=MEMORY_BYTES,
        host_budget_bytes=MEMORY_BYTES,
        roots=(folder,),
        state=state,
    )
    manager.start()
    try:
        for future in [manager.load_folder(name, folder / name) for name in ids]:
            future.result()
        yield manager
    finally:
        manager.close()
        state.close()


def measure(manager: AdapterManager, ids: list[str], resident: list[str], calls: int) -> dict[str, float]:
    """One round: microseconds of a pair of calls (their median), milliseconds of a snapshot."""
    draw = random.Random(SEED)
    names = draw.choices(ids, k=calls)
    versions = [manager.resolve(name) for name in resident]
    used = draw.choices(versions, k=calls)
    try:
        resolve = _each(names, lambda name: manager.release(manager.resolve(name)))
        activate = _each(used, lambda version: _use(manager, version))
        with _snapshots(manager) as snapshot_ms:
            beside = _each(used, lambda version: _use(manager, version))
            while not snapshot_ms:
                time.sleep(0.001)
    finally:
        for version in versions:
            manager.release(version)
    return {
        "resolve": float(np.median(resolve)),
        "activate": float(np.median(activate)),
        "beside": float(np.percentile(beside, 99.9)),
        "snapshot": float(np.median(snapshot_ms)),
    }


def _use(manager: AdapterManager, version: AdapterVersion) -> None:
    slot = manager.try_activate(version)
    assert slot is not None, "it was brought to the device, and there is room for all"
    manager.deactivate(version)


def _each(arguments: list[Any], call: Callable[[Any], None]) -> list[float]:
    """Microseconds of every call."""
    times = []
    for argument in arguments:
        begin = time.perf_counter_ns()
        call(argument)
        times.append((time.perf_counter_ns() - begin) / 1000)
    return times


@contextlib.contextmanager
def _snapshots(manager: AdapterManager) -> Iterator[list[float]]:
    """A thread that takes snapshots without pause; gets the milliseconds of each."""
    times: list[float] = []
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            begin = time.perf_counter()
            manager.snapshot()
            times.append(1000 * (time.perf_counter() - begin))

    thread = threading.Thread(target=run, name="snapshots")
    thread.start()
    try:
        yield times
    finally:
        stopping.set()
        thread.join()


def report(options: argparse.Namespace, machine: dict[str, Any], measured: dict[int, Measured]) -> None:
    """Print the table, write JSON and plot."""
    few, *_ = numbers = list(measured)
    spreads = {name: {n: Spread.of(measured[n][name]) for n in numbers} for name in CALLS}
    ratios = {
        name: {n: ratio(measured[n][name], measured[few][name]) for n in numbers} for name in ("resolve", "activate")
    }
    result = {
        "machine": machine,
        "settings": {
            "command": "python benchmarks/registry_scale.py",
            "calls": options.calls,
            "rounds": options.rounds,
        },
        "ratios": {CALLS[name]: {n: asdict(s) for n, s in of.items()} for name, of in ratios.items()},
        "spreads": {CALLS[name]: {n: asdict(s) for n, s in of.items()} for name, of in spreads.items()},
        "rounds": {n: {CALLS[name]: values for name, values in of.items()} for n, of in measured.items()},
    }
    groups = [str(n) for n in numbers]
    panels = [
        Panel("microseconds", groups, {CALLS[n].split(",")[0]: list(spreads[n].values()) for n in ratios}),
        Panel("milliseconds of a snapshot", groups, {"snapshot": list(spreads["snapshot"].values())}),
    ]
    title = f"calls under the manager's lock by known adapters\n{one_line(machine)}"
    for path in write_result(options.out, "registry_scale", result, panels, title):
        sys.stdout.write(f"wrote {path}\n")
    head = f"{'median (min..max) of the rounds':<38}" + "".join(f"{f'{n} known':>26}" for n in numbers)
    lines = [one_line(machine), "", head]
    for name, of in ratios.items():
        what = f"{CALLS[name].split(',')[0]} / with {few}"
        lines.append(f"{what:<38}" + "".join(f"{f'{s:.2f}':>26}" for s in of.values()))
    lines.append("")
    for name, of in spreads.items():
        lines.append(f"{CALLS[name]:<38}" + "".join(f"{f'{s:.2f}':>26}" for s in of.values()))
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
