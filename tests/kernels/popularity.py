"""How the rows of a batch are spread over adapters; shared by tests and benchmarks.

After `get_lora_lens` of Punica (punica-ai/punica@591b598), with base rows added, since a server always has them.
"""

import math
import random
from typing import Final

BASE_SLOT: Final = -1
ZIPF_EXPONENT: Final = 1.5
POPULARITIES: Final = ("base", "identical", "distinct", "uniform", "zipf", "mixed", "empty")


def get_segments(popularity: str, num_rows: int, num_slots: int, seed: int = 0) -> list[tuple[int, int]]:
    """Returns (slot, rows) of each segment, sorted by slot, base first.

    Args:
        popularity: one of POPULARITIES.
            base: no row is adapted.
            identical: all rows use one adapter.
            distinct: every row has another one, as far as there are slots.
            uniform: rows are spread evenly over sqrt(num_rows) adapters.
            zipf: the base is used most, the i-th adapter (i + 1)^-1.5 times as often.
            mixed: segments of many lengths, empty ones and repeated slots among them.
            empty: no segment at all.
        num_rows: rows of the batch.
        num_slots: adapters to choose from.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    slots = rng.sample(range(num_slots), num_slots)
    if popularity == "empty":
        return []
    if popularity == "base":
        return [(BASE_SLOT, num_rows)]
    if popularity == "identical":
        return [(slots[0], num_rows)]
    if popularity == "mixed":
        return _mixed(num_rows, num_slots, rng)
    if popularity == "distinct":
        drawn = [slots[i % num_slots] for i in range(num_rows)]
    elif popularity == "uniform":
        used = min(num_slots, math.ceil(math.sqrt(num_rows)))
        drawn = [slots[i % used] for i in range(num_rows)]
    elif popularity == "zipf":
        ranked = [BASE_SLOT, *slots]
        weights = [(i + 1) ** -ZIPF_EXPONENT for i in range(len(ranked))]
        drawn = rng.choices(ranked, weights, k=num_rows)
    else:
        raise ValueError(f"popularity must be one of {', '.join(POPULARITIES)}, got {popularity!r}")
    return [(slot, drawn.count(slot)) for slot in sorted(set(drawn))]


def _mixed(num_rows: int, num_slots: int, rng: random.Random) -> list[tuple[int, int]]:
    lengths = [0, 1, 3, 0, 2, 17, 1, 1, 5, 4]
    segments = []
    while num_rows > 0:
        length = min(num_rows, lengths[len(segments) % len(lengths)])
        segments.append((rng.randrange(BASE_SLOT, num_slots), length))
        num_rows -= length
    return sorted(segments, key=lambda segment: segment[0])
