"""What a server costs before and without requests: from `lorikeet serve` to its ready line, and idle.

Starts the demo base several times, as `make run` does: the first start, which finds caches as they are and may have to
quantize the base, apart from the later ones. Then the last server of each folder is left alone, with the adapter folder
watched, and its processor time is compared with the clock's. Two folders: that of the examples, and one with many.

Prints the goals beside what was measured, and writes JSON and a plot.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapter_files import write_numbered_adapters
from bar_panels import Panel, write_result
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.config import ServerConfig
from machine import ROOT, describe_machine, one_line, warn_if_busy
from measurement import Spread
from server_process import running_server
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 7
TARGETS = ("q_proj", "v_proj")
RANK = 8
# What a start leaves to be done, such as the settling of folders.
SETTLE_S = 3.0
GOAL_START_S, GOAL_IDLE = 5.0, 0.02
QUICK = {"starts": 2, "idle": 1.0, "adapters": 3, "settle": 0.5}


@dataclass(frozen=True, slots=True)
class Costs:
    """Of the servers of one folder.

    Attributes:
        adapters: how many it has.
        start_s: wall seconds to the ready line, by start.
        start_cpu_s: processor seconds by then.
        idle: processor time over wall time, without requests.
        resident_mb: meanwhile.
    """

    adapters: int
    start_s: list[float]
    start_cpu_s: list[float]
    idle: float
    resident_mb: float


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    machine = describe_machine()
    warn_if_busy(machine, "starts will take longer")
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=2 * (options.starts + 1), unit="part") as bar:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        if options.model is None:
            shutil.copytree(ROOT / "examples" / "adapters", few)
        else:
            few.mkdir()
        write_numbered_adapters(base, many, count=options.adapters, ranks=[RANK], targets=TARGETS, seed=SEED)
        found = {
            name: measure(folder, options, Path(scratch) / "log", bar)
            for name, folder in (("examples", few), ("many", many))
        }
    report(options, machine, found)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--starts", type=int, default=4, help="starts with each folder, the first of all apart [4]")
    add("--idle", type=float, default=60.0, help="seconds without requests [60]")
    add("--settle", type=float, default=SETTLE_S, help="seconds before these begin [3]")
    add("--adapters", type=int, default=50, help="in the second folder [50]")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads [one for each core]")
    add("--model", type=Path, help="another base model's directory [the demo base]")
    add("--out", type=Path, default=RESULTS, help="folder for JSON and plot [benchmarks/results]")
    add("--quick", action="store_true", help="small defaults for everything: does it run?")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def measure(folder: Path, options: argparse.Namespace, log: Path, bar: "tqdm[Any]") -> Costs:
    """Start several times, and watch the last one do nothing."""
    model = str(options.model or "demo")
    arguments = ["--model", model, "--adapters", str(folder), "--threads", str(options.threads)]
    start_s, start_cpu_s = [], []
    idle = resident = 0.0
    for number in range(options.starts):
        with running_server(arguments, log) as server:
            start_s.append(server.start_s)
            start_cpu_s.append(server.start_cpu_s)
            bar.update()
            if number == options.starts - 1:
                time.sleep(options.settle)
                begin, spent = time.perf_counter(), server.cpu_s()
                time.sleep(options.idle)
                idle = (server.cpu_s() - spent) / (time.perf_counter() - begin)
                resident = server.resident_bytes / 1e6
                bar.update()
    return Costs(sum(1 for _ in folder.iterdir()), start_s, start_cpu_s, idle, resident)


def report(options: argparse.Namespace, machine: dict[str, Any], found: dict[str, Costs]) -> None:
    """Print the table, write JSON and plot."""
    later = {
        name: (costs.start_s[1:], costs.start_cpu_s[1:]) if name == "examples" else (costs.start_s, costs.start_cpu_s)
        for name, costs in found.items()
    }
    starts = {name: Spread.of(wall) for name, (wall, _) in later.items()}
    cpu = {name: Spread.of(spent) for name, (_, spent) in later.items()}
    settings = {
        "command": "python benchmarks/process_costs.py",
        **{name: value for name, value in vars(options).items() if name not in ("model", "out", "quick", "threads")},
    }
    result = {
        "machine": machine,
        "settings": settings,
        "goals": {"start_s": GOAL_START_S, "idle": GOAL_IDLE},
        "first_start_s": found["examples"].start_s[0],
        "start_s": {name: asdict(spread) for name, spread in starts.items()},
        "start_cpu_s": {name: asdict(spread) for name, spread in cpu.items()},
        "folders": {name: asdict(costs) for name, costs in found.items()},
    }
    groups = [f"{costs.adapters} adapters" for costs in found.values()]
    shares = [Spread(*[100 * costs.idle] * 3) for costs in found.values()]
    panels = [
        Panel("seconds to the ready line", groups, {"": list(starts.values())}, GOAL_START_S),
        Panel("idle, % of a core", groups, {"": shares}, 100 * GOAL_IDLE),
    ]
    for path in write_result(options.out, "process_costs", result, panels, one_line(machine)):
        sys.stdout.write(f"wrote {path}\n")
    lines = [one_line(machine), "", f"{'':<42}" + "".join(f"{group:>24}" for group in groups) + f"{'goal':>14}"]
    for title, cells, goal in (
        ("start to ready, wall s (min..max)", [f"{s:.1f}" for s in starts.values()], f"< {GOAL_START_S:g}"),
        ("of which processor time, s", [f"{s:.1f}" for s in cpu.values()], ""),
        (
            f"idle for {options.idle:g} s, % of a core",
            [f"{100 * costs.idle:.2f}" for costs in found.values()],
            f"< {100 * GOAL_IDLE:g}",
        ),
        ("resident MB", [f"{costs.resident_mb:.0f}" for costs in found.values()], ""),
    ):
        lines.append(f"{title:<42}" + "".join(f"{cell:>24}" for cell in cells) + f"{goal:>14}")
    lines.append(f"the first start of all took {found['examples'].start_s[0]:.1f} s")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
