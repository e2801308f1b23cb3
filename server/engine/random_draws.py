"""Random numbers that depend on nothing but a request's seed and the index of the token. Imports no torch.

SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195) used as a counter-based generator: no state is kept,
so batching, chunking and preemption cannot shift a request's numbers; and they are the same on every device.
"""

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of the stream of `seed` (0 to 2^64 - 1), uniform in [0, 1) with 53 bits."""
    # The seed is mixed first: neighbouring seeds must not be shifted copies of one stream.
    return (_mix((_mix((seed + _GAMMA) & _MASK) + (index + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
