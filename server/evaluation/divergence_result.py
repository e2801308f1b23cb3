"""How far two models were found to be apart. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of distributions Q from P, the Kullback-Leibler divergence sum p (log p - log q) in nats.

    Attributes:
        tokens: rows that were compared.
        mean: over them.
        largest: of one row.
        agreement: share of the rows where both have the same likeliest token.
    """

    tokens: int
    mean: float
    largest: float
    agreement: float
