"""The byte model: the least time that a decode step can take, because its bytes must be read from device memory once.

A step reads every NF4 weight and the 16-bit output head, the keys and values of every stream's context, and the weights
of every adapter that is used, once each. Activations are left out: they are small and stay in the cache.
Example, Llama-3-8B: 3.600 GB of NF4 weights, 1.051 GB of head, 131,072 bytes of KV for each token, 83.9 MB for each
adapter of rank 16 on all linears.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

H100_BANDWIDTH: Final = 3.35e12
"""Bytes a second by the datasheet of an H100 SXM; what cards of that name measure is less."""

_NF4_BLOCK = 64  # weights that share a constant
_GROUP = 256  # constants that share a second-level scale
_SIXTEEN_BIT = 2  # bytes


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """A Llama-like decoder.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        kv: width of the keys of a token, all heads together; that of the values is the same.
        intermediate: width inside the MLP.
        vocab: rows of the output head.
    """

    layers: int
    hidden: int
    kv: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "ModelShapes":
        """Of transformers' config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv=config.num_key_value_heads * head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
        )

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of the linears of one layer."""
        hidden, wide = self.hidden, self.intermediate
        return {
            "q": (hidden, hidden),
            "k": (hidden, self.kv),
            "v": (hidden, self.kv),
            "o": (hidden, hidden),
            "gate": (hidden, wide),
            "up": (hidden, wide),
            "down": (wide, hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linears."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def head_bytes(self) -> int:
        """Of the output head in 16 bit."""
        return self.vocab * self.hidden * _SIXTEEN_BIT

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values in 16 bit, all layers."""
        return 2 * self.layers * self.kv * _SIXTEEN_BIT

    def nf4_bytes(self, *, nested: bool = True) -> float:
        """Of all layers' linears; the constants in 8 bit with a second level, or in float32."""
        return self.linear_weights * nf4_bits(nested=nested) / 8

    def adapter_bytes(self, rank: int) -> int:
        """Of one 16-bit adapter of this rank on all linears."""
        return self.layers * rank * sum(i + o for i, o in self.linears.values()) * _SIXTEEN_BIT


LLAMA_3_8B: Final = ModelShapes(layers=32, hidden=4096, kv=1024, intermediate=14336, vocab=128256)


def nf4_bits(*, nested: bool) -> float:
    """Bits a weight: 4, and its share of the constants (QLoRA, arXiv 2305.14314, section 3)."""
    return 4 + (8 / _NF4_BLOCK + 32 / (_NF4_BLOCK * _GROUP) if nested else 32 / _NF4_BLOCK)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each of some streams.

    Attributes:
        shapes: of the model.
        batch: streams.
        context: tokens of each stream, this one included.
        rank: of the adapters.
        adapters: different ones in the batch; 0: base only.
        nested: whether the NF4 constants are.
    """

    shapes: ModelShapes
    batch: int
    context: int
    rank: int = 0
    adapters: int = 0
    nested: bool = True

    @property
    def num_bytes(self) -> float:
        """What must be read."""
        base = self.shapes.nf4_bytes(nested=self.nested) + self.shapes.head_bytes
        kv = self.batch * self.context * self.shapes.kv_bytes
        return base + kv + self.adapters * self.shapes.adapter_bytes(self.rank)

    def seconds(self, bandwidth: float) -> float:
        """The least time at so many bytes a second."""
        return self.num_bytes / bandwidth

    def tokens_per_s(self, bandwidth: float) -> float:
        """The most tokens a second, all streams together."""
        return self.batch / self.seconds(bandwidth)

    @property
    def overhead(self) -> float:
        """Time that the adapters add to the base's, as a part of it; the same at any bandwidth."""
        return self.num_bytes / replace(self, adapters=0).num_bytes - 1
