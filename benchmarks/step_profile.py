"""`make profile`: where the time of a decode step goes on this CPU, part by part.

The parts of `lorikeet serve` but gRPC, stepped by hand: base only and 8 mixed adapters, at 1, 8 and 32 streams. Clocks
are put on the entry points of the operators and on the parts of the engine; steps with clocks and steps without take
turns, so that what the clocks themselves cost is known. *Python overhead* is what a step takes outside of operators:
the engine's parts, and the decoder's code between two operators, the clocks' own time included. Prints a table, writes
JSON and a plot of stacked bars.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lorikeet.adapters import layers
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.info import Tier
from lorikeet.kernels import activation, attention, lora, norm, rope
from lorikeet.kernels.lora_site import LoraSite
from lorikeet.server.app import App, assemble
from lorikeet.server.base import linears
from lorikeet.server.base.demo import prepare_demo_base
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.config import ServerConfig
from lorikeet.server.engine.request import Event, Failed, Request
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.logs import configure_logs
from lorikeet.server.policy.holder import PolicyHolder
from lorikeet.server.resolve import resolve_compute
from machine import describe_machine, one_line
from measurement import Spread
from part_clock import PartClock, Timed
from tqdm import tqdm
from workload import in_turn, write_random_adapters

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 7
BASE, MIXED = "base", "mixed"
OPERATORS = ("linears", "head", "LoRA", "attention", "norms, rotation, activation", "sampling")
ENGINE = ("decoder between operators", "schedule", "inputs", "detokenize, deliver, metrics, loop")
QUICK = {"streams": [1, 2], "steps": 3, "rounds": 1, "adapters": 2, "prompt": 8}


@dataclass(slots=True)
class Profile:
    """One number of streams of one kind.

    Attributes:
        name: as printed.
        plain_ms: of each round, the median step without clocks.
        clocked_ms: of each round, the mean step with clocks.
        parts_ms: part -> of each round, the mean over its steps.
    """

    name: str
    plain_ms: list[float] = field(default_factory=list)
    clocked_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)

    def part(self, name: str) -> float:
        """Milliseconds of a part, median over the rounds."""
        return statistics.median(self.parts_ms[name])

    @property
    def python_ms(self) -> Spread:
        """What is outside of operators, over the rounds."""
        return Spread.of([sum(times) for times in zip(*(self.parts_ms[part] for part in ENGINE), strict=True)])

    @property
    def python_percent(self) -> Spread:
        """The same as a share of the clocked step."""
        outside = zip(*(self.parts_ms[part] for part in ENGINE), strict=True)
        return Spread.of([100 * sum(times) / whole for times, whole in zip(outside, self.clocked_ms, strict=True)])


def main() -> int:
    """Run it.

    Returns:
        The exit status.
    """
    options = parse()
    configure_logs("warning", "console")
    machine = describe_machine()
    base = options.model or prepare_demo_base(ServerConfig().cache_dir)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (Path(scratch) / "adapters").resolve()
        ids = write_random_adapters(base, folder, count=options.adapters, rank=options.rank, seed=SEED)
        stepper = Stepper(base, folder, ids, options.threads)
        try:
            profiles = [
                profile(stepper, streams, adapter_ids, options)
                for streams in options.streams
                for adapter_ids in ([""], ids)
            ]
        finally:
            stepper.close()
    report(profiles, machine, options)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--streams", type=int, nargs="+", default=[1, 8, 32], help="requests at the same time [1 8 32]")
    add("--adapters", type=int, default=8, help="random adapters of the mix [8]")
    add("--rank", type=int, default=16, help="of each adapter, on all linears [16]")
    add("--prompt", type=int, default=64, help="tokens in each prompt [64]")
    add("--steps", type=int, default=10, help="of each kind in a round [10]")
    add("--rounds", type=int, default=5, help="times that both kinds of steps take turns [5]")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads [one for each core]")
    add("--model", type=Path, help="another base model's directory [the demo base]")
    add("--out", type=Path, default=RESULTS, help="folder for JSON and plot [benchmarks/results]")
    add("--quick", action="store_true", help="small defaults for everything: does it run?")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


class Stepper:
    """A server without its step thread."""

    def __init__(self, base: Path, adapters: Path, adapter_ids: Sequence[str], threads: int) -> None:
        config = ServerConfig(model=str(base), adapters=(adapters,), metrics=False, device="cpu", threads=threads)
        compute = resolve_compute(config)
        torch.set_num_threads(compute.threads)
        model = load_base(str(base), device=compute.device, compute_dtype=compute.dtype, progress=False)
        self.app: App = assemble(config, compute, model, PolicyHolder(None))
        self.app.manager.start()
        for name in adapter_ids:
            self.app.manager.load(name)
            self.app.manager.prefetch(name, Tier.DEVICE)
        self._draw = random.Random(SEED)
        self._failure = ""
        head: Any = model.site_module(model.site_table.sites[-1])
        loop: Any = self.app.engine._loop
        self.clock = PartClock(
            [
                Timed(linears, "nf4_linear", "linears"),
                Timed(head.base, "forward", "head"),
                Timed(LoraSite, "add_", "LoRA"),
                *(Timed(lora, name, "LoRA") for name in ("lora_shrink", "lora_expand_", "lora_affine_")),
                Timed(layers.LoraLinear, "_with_own_tensors", "LoRA"),
                Timed(attention, "paged_attention", "attention"),
                *(Timed(norm, name, OPERATORS[4]) for name in ("rms_norm", "add_rms_norm_")),
                Timed(rope, "rope_kv_write_", OPERATORS[4]),
                Timed(activation, "silu_and_mul", OPERATORS[4]),
                Timed(loop._sampler, "sample", "sampling"),
                Timed(BaseModel, "logits", ENGINE[0]),
                Timed(loop._scheduler, "schedule", "schedule"),
                Timed(loop._scheduler, "complete", "schedule"),
                Timed(loop._runner, "forward", "inputs"),
            ]
        )

    def close(self) -> None:
        """Stop the adapter threads."""
        self.app.engine.stop()
        self.app.manager.close()
        self.app.state.close()

    def start(self, streams: int, adapter_ids: Sequence[str], prompt_tokens: int, tokens: int) -> list[Request]:
        """Hand in greedy requests, and step until all of them decode."""
        vocab_size = self.app.base.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        requests = []
        for i, name in enumerate(in_turn(adapter_ids, streams)):
            prompt = self._draw.choices(range(vocab_size // 4, vocab_size // 2), k=prompt_tokens)
            adaptation = Adaptation.single(self.app.manager.resolve(name)) if name else None
            requests.append(Request(f"{time.monotonic_ns()}-{i}", prompt, params, adaptation, self._hear))
            self.app.engine.submit(requests[-1])
        while not all(request.output_token_ids for request in requests):
            self.app.engine.step()
            self.check()
        return requests

    def end(self, requests: Sequence[Request]) -> None:
        """Abort them."""
        for request in requests:
            self.app.engine.abort(request.request_id)
        self.app.engine.step()
        self._failure = ""

    def steps_ms(self, count: int) -> list[float]:
        """Milliseconds of so many steps."""
        times = []
        for _ in range(count):
            begin = time.perf_counter_ns()
            self.app.engine.step()
            times.append((time.perf_counter_ns() - begin) / 1e6)
        self.check()
        return times

    def check(self) -> None:
        """Raise if a request failed."""
        if self._failure:
            raise RuntimeError(self._failure)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._failure = event.error.message


def profile(stepper: Stepper, streams: int, adapter_ids: Sequence[str], options: argparse.Namespace) -> Profile:
    """Measure one number of streams."""
    found = Profile(f"{streams} {MIXED if adapter_ids[0] else BASE}")
    found.parts_ms = {part: [] for part in OPERATORS + ENGINE}
    tokens = 2 * options.steps * (options.rounds + 1) + 8
    requests = stepper.start(streams, adapter_ids, options.prompt, tokens)
    stepper.steps_ms(options.steps)  # warm
    for _ in tqdm(range(options.rounds), desc=found.name):
        found.plain_ms.append(statistics.median(stepper.steps_ms(options.steps)))
        with stepper.clock.running():
            whole = statistics.fmean(stepper.steps_ms(options.steps))
        spent = {part: stepper.clock.spent[part] / 1e6 / options.steps for part in (OPERATORS + ENGINE)[:-1]}
        spent[ENGINE[-1]] = whole - sum(spent.values())
        found.clocked_ms.append(whole)
        for part, milliseconds in spent.items():
            found.parts_ms[part].append(milliseconds)
    stepper.end(requests)
    return found


def report(profiles: Sequence[Profile], machine: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table, write JSON and plot."""
    lines = [f"{'':<36}" + "".join(f"{each.name:>17}" for each in profiles)]
    lines.append(f"{'Python overhead, ms (median)':<36}" + "".join(f"{p.python_ms.median:>17.2f}" for p in profiles))
    lines.append(
        f"{'Python overhead, % of the step':<36}" + "".join(f"{p.python_percent.median:>17.1f}" for p in profiles)
    )
    lines += ["", "ms a step (% of it)"]
    for part in OPERATORS + ENGINE:
        cells = [(p.part(part), 100 * p.part(part) / statistics.median(p.clocked_ms)) for p in profiles]
        lines.append(f"{part:<36}" + "".join(f"{f'{ms:.2f} ({percent:.1f})':>17}" for ms, percent in cells))
    for title, pick in (("step with clocks", "clocked_ms"), ("step without", "plain_ms")):
        lines.append(f"{title:<36}" + "".join(f"{statistics.median(getattr(p, pick)):>17.2f}" for p in profiles))
    sys.stdout.write("\n" + "\n".join(lines) + f"\n\n{one_line(machine)}\n")
    settings = {name: getattr(options, name) for name in ("adapters", "rank", "prompt", "steps", "rounds", "threads")}
    result = {
        "machine": machine,
        "settings": {"command": "make profile", "base": "demo" if options.model is None else "--model", **settings},
        "profiles": {
            p.name: {
                "python_ms": asdict(p.python_ms),
                "python_percent": asdict(p.python_percent),
                "step_ms": asdict(Spread.of(p.plain_ms)),
                "clocked_step_ms": asdict(Spread.of(p.clocked_ms)),
                "parts_ms": {part: asdict(Spread.of(times)) for part, times in p.parts_ms.items()},
            }
            for p in profiles
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / f"step_profile.{kind}" for kind in ("json", "png")]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    draw(paths[1], profiles, f"a decode step, {options.threads} threads\n{one_line(machine)}")
    for path in paths:
        sys.stdout.write(f"wrote {path}\n")


def draw(path: Path, profiles: Sequence[Profile], title: str) -> None:
    """A stacked bar for each, in percent of its step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.4), layout="constrained")
    below = [0.0] * len(profiles)
    for part in OPERATORS + ENGINE:
        heights = [100 * p.part(part) / statistics.median(p.clocked_ms) for p in profiles]
        hatch = "//" if part in ENGINE else ""
        axes.bar([p.name for p in profiles], heights, 0.7, below, label=part, hatch=hatch)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for i, each in enumerate(profiles):
        axes.text(i, 101, f"{statistics.median(each.plain_ms):.1f} ms", ha="center", fontsize=8)
    axes.set_ylabel("% of a decode step; hatched: outside of operators")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
