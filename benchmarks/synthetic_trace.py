"""S-LoRA's synthetic trace: who asks which adapter when, for how much.

As `generate_requests` in benchmarks/trace.py of S-LoRA (github.com/S-LoRA/S-LoRA) draws it, in the same order from the
same generator, so that the same numbers give the same trace: adapter floor(power(alpha) * number of adapters), which is
uniform for alpha 1 and the more skewed the smaller alpha is; uniform lengths; gamma intervals.
"""

from dataclasses import dataclass

import numpy as np

SLORA_SEED = 42


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        adapter: number of the adapter.
        prompt_tokens, output_tokens: lengths.
        arrival_s: seconds after the beginning.
    """

    adapter: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float


@dataclass(frozen=True, slots=True)
class TraceShape:
    """What all traces of a comparison share.

    Attributes:
        num_requests: in all.
        alpha: of the power distribution.
        rate: requests a second.
        cv: coefficient of variation of the intervals; 1: a Poisson process.
        prompt, output: lengths are drawn from [low, high).
    """

    num_requests: int
    alpha: float
    rate: float
    cv: float
    prompt: tuple[int, int]
    output: tuple[int, int]


def synthetic_trace(num_adapters: int, shape: TraceShape, seed: int = SLORA_SEED) -> list[TraceRequest]:
    """The trace over so many adapters. All numbers of adapters get the same lengths and arrivals."""
    draw = np.random.RandomState(seed)
    n = shape.num_requests
    adapters = (draw.power(shape.alpha, n) * num_adapters).astype(int)
    prompts = draw.randint(*shape.prompt, n)
    outputs = draw.randint(*shape.output, n)
    arrivals = np.cumsum(draw.gamma(1 / shape.cv**2, shape.cv**2 / shape.rate, n))
    # power() of a draw that rounds to 1 would name an adapter that does not exist.
    return [
        TraceRequest(min(int(a), num_adapters - 1), int(p), int(o), float(t))
        for a, p, o, t in zip(adapters, prompts, outputs, arrivals, strict=True)
    ]
