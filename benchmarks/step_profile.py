"""`make profile`: where the time of a decode step goes on this CPU, part by part.

The parts of `lorikeet serve` but gRPC, stepped by hand: base only and 8 mixed adapters, at 1, 8 and 32 streams. Clocks
are put on the entry points of the operators and on the parts of the engine; steps with clocks and steps without take
turns, so that what the clocks themselves cost is known. *Python overhead* is what a step takes outside of operators:
the engine's parts, and the decoder's code between two operators, the clocks' own time included.

All layers are one native call, into which no clock can look. So steps that call its operators one by one, as is done
where the call is not known to fit, take turns with those that are served, and show what is inside. Prints a table of
each way, writes JSON and a plot of stacked bars.
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
from pathlib import Path
from typing import Any

import torch
from lorikeet.adapters import layers
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.info import Tier
from lorikeet.kernels import activation, attention, decoder, lora, norm, rope
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
from part_clock import PartClock, Timed
from profile_report import ENGINE, LAYERS, ONE_BY_ONE, OPERATORS, SERVED, SMALL, Profile, as_json, draw, table
from tqdm import tqdm
from workload import in_turn, write_random_adapters

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 7
BASE, MIXED = "base", "mixed"
QUICK = {"streams": [1, 2], "steps": 3, "rounds": 1, "adapters": 2, "prompt": 8}


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
    report({way: [each[way] for each in profiles] for way in (SERVED, ONE_BY_ONE)}, machine, options)
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
        self._lean = model.lean
        head: Any = model.site_module(model.site_table.sites[-1])
        loop: Any = self.app.engine._loop
        self.clock = PartClock(
            [
                Timed(decoder, "_run_layers", LAYERS),
                Timed(linears, "nf4_linear", "linears"),
                Timed(head.base, "forward", "head"),
                Timed(LoraSite, "add_", "LoRA"),
                *(Timed(lora, name, "LoRA") for name in ("lora_shrink", "lora_expand_", "lora_affine_")),
                Timed(layers.LoraLinear, "_with_own_tensors", "LoRA"),
                Timed(attention, "paged_attention", "attention"),
                *(Timed(norm, name, SMALL) for name in ("rms_norm", "add_rms_norm_")),
                Timed(rope, "rope_kv_write_", SMALL),
                Timed(activation, "silu_and_mul", SMALL),
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

    def steps_ms(self, count: int, way: str) -> list[float]:
        """Milliseconds of so many steps."""
        if self._lean is not None:
            self._lean.one_by_one = way == ONE_BY_ONE
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


def profile(
    stepper: Stepper, streams: int, adapter_ids: Sequence[str], options: argparse.Namespace
) -> dict[str, Profile]:
    """Measure one number of streams, each way."""
    name = f"{streams} {MIXED if adapter_ids[0] else BASE}"
    found = {way: Profile(name, parts_ms={part: [] for part in OPERATORS + ENGINE}) for way in (SERVED, ONE_BY_ONE)}
    tokens = 4 * options.steps * (options.rounds + 1) + 8
    requests = stepper.start(streams, adapter_ids, options.prompt, tokens)
    for way in found:
        stepper.steps_ms(options.steps, way)  # warm
    for _ in tqdm(range(options.rounds), desc=name):
        for way, each in found.items():
            each.plain_ms.append(statistics.median(stepper.steps_ms(options.steps, way)))
            with stepper.clock.running():
                whole = statistics.fmean(stepper.steps_ms(options.steps, way))
            spent = {part: stepper.clock.spent[part] / 1e6 / options.steps for part in (OPERATORS + ENGINE)[:-1]}
            spent[ENGINE[-1]] = whole - sum(spent.values())
            each.clocked_ms.append(whole)
            for part, milliseconds in spent.items():
                each.parts_ms[part].append(milliseconds)
    stepper.end(requests)
    return found


def report(by_way: dict[str, list[Profile]], machine: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables, write JSON and plot."""
    for way, profiles in by_way.items():
        sys.stdout.write("\n" + "\n".join(table(way, profiles)) + "\n")
    sys.stdout.write(f"\n{one_line(machine)}\n")
    settings = {name: getattr(options, name) for name in ("adapters", "rank", "prompt", "steps", "rounds", "threads")}
    result = {
        "machine": machine,
        "settings": {"command": "make profile", "base": "demo" if options.model is None else "--model", **settings},
        "profiles": {each.name: as_json(each) for each in by_way[SERVED]},
        "one_by_one": {each.name: as_json(each) for each in by_way[ONE_BY_ONE]},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / f"step_profile.{kind}" for kind in ("json", "png")]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    draw(paths[1], by_way, f"a decode step, {options.threads} threads\n{one_line(machine)}")
    for path in paths:
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    sys.exit(main())
