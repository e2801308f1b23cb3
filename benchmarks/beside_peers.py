"""Lorikeet beside its peers on the same work: PEFT's mixed batch on the same NF4 base, llama.cpp on the same model.

Both peers are given every advantage that they have (peft_side.py, llama_side.py). A peer that is not installed is named
as missing. Before anything is timed, what each adapter adds to the logits is compared between llama.cpp and PEFT: a
peer that applied the wrong adapter, or none, or applied it wrongly, would be no peer.
"""

import argparse
import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison import Side, compare
from effect import measure_effect
from llama_side import LlamaSide, fastest_llama, why_missing
from lorikeet_side import LorikeetSide
from machine import one_line
from options import base_of
from report import Headline, Measure, Ratio, Report, agreement_line, as_json, as_text, write
from transformers import AutoConfig
from workload import Size, Workload, in_turn, write_random_adapters

SEED = 7
BASE, SHARED, MIXED, DISTINCT = "Lorikeet base", "Lorikeet one adapter", "Lorikeet mixed", "Lorikeet all distinct"
PEFT = "PEFT mixed"
LLAMA_BASE, LLAMA_SHARED, LLAMA_MIXED = "llama.cpp base", "llama.cpp one adapter", "llama.cpp mixed"
RATIOS = (
    *(Ratio(MIXED, other, measure) for other in (PEFT, LLAMA_MIXED) for measure in (Measure.DECODE, Measure.WHOLE)),
    *(Ratio(one, BASE, Measure.STEP) for one in (SHARED, MIXED, DISTINCT)),
    Ratio(BASE, LLAMA_BASE, Measure.STEP),
    Ratio(SHARED, LLAMA_SHARED, Measure.STEP),
)
# What is to be reached on 2 cores with AVX512-BF16, with 8 adapters of rank 16.
HEADLINES = (
    *(
        Headline(Ratio(MIXED, other, measure), 32, goal)
        for measure in (Measure.DECODE, Measure.WHOLE)
        for other, goal in ((PEFT, 5.0), (LLAMA_MIXED, 5.0), (LLAMA_BASE, 1.5))
    ),
    Headline(Ratio(MIXED, BASE, Measure.STEP), 32, 1.25),
    Headline(Ratio(SHARED, BASE, Measure.STEP), 32),
    Headline(Ratio(DISTINCT, BASE, Measure.STEP), 32),
    Headline(Ratio(BASE, LLAMA_BASE, Measure.STEP), 1, 2.0),
    Headline(Ratio(SHARED, LLAMA_SHARED, Measure.STEP), 1, 2.0),
)
# Room for the adapters of all streams at once.
ADAPTER_BYTES = "2GiB"


def measure_beside_peers(
    base: Path, gguf_file: Path | None, size: Size, options: argparse.Namespace, machine: dict[str, Any]
) -> None:
    """Run all sides, print the report, write JSON and plot.

    Args:
        base: the base model's directory.
        gguf_file: the same model for llama.cpp, if there is one.
        size: streams, tokens, adapters of the mixed batch, rounds.
        options: rank, threads, out and model of the command line.
        machine: see describe_machine; gets llama-cpp-python's version.
    """
    vocab_size = AutoConfig.from_pretrained(base).vocab_size
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        adapters = Path(scratch)
        most = max(size.streams)
        count = max(most, size.adapters)
        every = write_random_adapters(base, adapters, count=count, rank=options.rank, seed=SEED)
        ids = every[: size.adapters]
        prompts = Workload(most, size.prompt, size.tokens).prompts(vocab_size, seed=SEED)
        missing: dict[str, str] = {}
        chosen: dict[str, Any] = {}

        lorikeet = LorikeetSide(
            base,
            adapters,
            every,
            threads=options.threads,
            adapter_device_bytes=ADAPTER_BYTES,
            adapter_host_bytes=ADAPTER_BYTES,
        )
        stack.callback(lorikeet.close)
        chosen["Lorikeet"] = str(lorikeet.dtype)
        sides = _lorikeet_sides(lorikeet, every, size)

        peft = effect = None
        if importlib.util.find_spec("peft") is None:
            missing[PEFT] = "peft is not installed (pip install -c constraints.txt -e '.[bench]')"
        else:
            from peft_side import fastest_peft

            peft = fastest_peft(base, adapters, ids, prompts)
            chosen["PEFT"] = str(peft.dtype)
            sides.append(Side(PEFT, lambda prompts, n: peft.run(prompts, in_turn(ids, len(prompts)), n)))
        if (why := why_missing(gguf_file)) is not None:
            missing |= dict.fromkeys((LLAMA_BASE, LLAMA_SHARED, LLAMA_MIXED), why)
        else:
            llama, chosen["llama.cpp"] = fastest_llama(
                gguf_file, base, adapters, ids, prompts, threads=options.threads, tokens=size.prompt + size.tokens
            )
            stack.callback(llama.close)
            machine["versions"]["llama-cpp-python"] = llama.version
            sides += _llama_sides(llama, ids)
        if peft is not None and why is None:
            effect = measure_effect(
                base, gguf_file, adapters / "strong", prompts[:4], rank=options.rank, threads=options.threads
            )

        workloads = [Workload(n, size.prompt, size.tokens) for n in size.streams]
        series = compare(sides, workloads, rounds=size.rounds, vocab_size=vocab_size)
    report = Report(series, RATIOS, HEADLINES, missing)
    settings = {
        "command": "make bench",
        "base": base_of(options),
        "adapters": f"{size.adapters} adapters of rank {options.rank} on all linears",
        "prompt_tokens": size.prompt,
        "new_tokens": size.tokens,
        "rounds": size.rounds,
        "chosen": chosen,
        "effect": asdict(effect) if effect is not None else None,
    }
    what = f"{settings['adapters']}, prompt {size.prompt}, {size.tokens} new tokens"
    lines = [as_text(report), ""]
    if peft is not None:
        lines.append(agreement_line(series, MIXED, PEFT))
    if effect is not None:
        lines.append(effect.as_line())
    lines += [what, *(f"{side}: {how}" for side, how in chosen.items()), one_line(machine)]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    for path in write(
        options.out, "bench_cpu", as_json(report, machine, settings), series, f"{what}\n{one_line(machine)}"
    ):
        sys.stdout.write(f"wrote {path}\n")


def _lorikeet_sides(lorikeet: LorikeetSide, every: list[str], size: Size) -> list[Side]:
    mixed = every[: size.adapters]
    return [
        Side(BASE, lambda prompts, n: lorikeet.run(prompts, None, n)),
        Side(SHARED, lambda prompts, n: lorikeet.run(prompts, mixed[:1] * len(prompts), n)),
        Side(MIXED, lambda prompts, n: lorikeet.run(prompts, in_turn(mixed, len(prompts)), n)),
        Side(
            DISTINCT,
            lambda prompts, n: lorikeet.run(prompts, every[: len(prompts)], n),
            only=[n for n in size.streams if n > size.adapters],  # with fewer streams, the mixed batch is that
        ),
    ]


def _llama_sides(llama: LlamaSide, ids: list[str]) -> list[Side]:
    return [
        Side(LLAMA_BASE, lambda prompts, n: llama.run(prompts, None, n)),
        Side(LLAMA_SHARED, lambda prompts, n: llama.run(prompts, ids[:1] * len(prompts), n)),
        Side(LLAMA_MIXED, lambda prompts, n: llama.run(prompts, in_turn(ids, len(prompts)), n)),
    ]
