"""Which versions can answer together. Imports no torch; called under the manager's lock."""

import itertools
from collections.abc import Sequence
from typing import Protocol

from .adapter_tokenizer import AdapterTokenizer
from .errors import AdapterCompositionError, AdapterMemoryError
from .info import Tier
from .origin import Origin
from .registry import Registry
from .version import AdapterVersion


class Composable(Protocol):
    """What is asked of a version before it answers, or is merged, with others."""

    @property
    def version(self) -> AdapterVersion:
        """Its identity."""
        ...

    @property
    def origin(self) -> Origin:
        """What was found in it."""
        ...

    @property
    def tokenizer(self) -> AdapterTokenizer | None:
        """Its own; equal ones are the same object."""
        ...


def check_composition(registry: Registry, members: Sequence[tuple[AdapterVersion, float]]) -> None:
    """Raise unless versions that the caller holds can answer together with these weights.

    Raises:
        AdapterCompositionError: a version is there twice; one that does more than add a low-rank delta has another
            weight than 1; two change the same module, and one of them not by a low-rank delta; two have token ids, or
            a tokenizer, of their own.
        AdapterMemoryError: they do not fit on the device together, beside what is pinned there.
    """
    check_sum([(registry.records[version], weight) for version, weight in members])
    check_together(registry, [version for version, _ in members])


def check_sum(members: Sequence[tuple[Composable, float]]) -> None:
    """Raise unless there is a sum of these versions with these weights; memory aside.

    Raises:
        AdapterCompositionError: see `check_composition`.
    """
    for (one, _), (other, _) in itertools.combinations(members, 2):
        _check_pair(one, other)
    for member, weight in members:
        _check_weight(member, weight)


def check_together(registry: Registry, versions: Sequence[AdapterVersion]) -> None:
    """Raise unless versions fit on the device at the same time, beside what is pinned there.

    Raises:
        AdapterMemoryError: they do not.
    """
    memory = registry.memory
    records = [registry.records[version] for version in versions]
    pinned = [registry.current[i] for i, t in registry.pins.items() if t is Tier.DEVICE and i in registry.current]
    kept = [record for record in pinned if record not in records]
    needed, held = sum(r.device_bytes for r in records), sum(r.device_bytes for r in kept)
    if needed + held > memory.device_budget or len(records) + len(kept) > memory.max_slots:
        names = ", ".join(repr(record.version.adapter_id) for record in records)
        raise AdapterMemoryError(
            f"The adapters {names} need {needed} bytes of device memory at the same time; there are "
            f"{memory.device_budget} for {memory.max_slots} adapters at most, and pinned ones take {held} of them. "
            "Name fewer in a request, unpin some, or raise --adapter-device-bytes (or --adapter-slots).",
            {"adapter_id": "+".join(record.version.adapter_id for record in records)[:256]},
        )


def _check_weight(record: Composable, weight: float) -> None:
    full = record.origin.report.full_modules
    if full and weight != 1.0:
        adapter_id = record.version.adapter_id
        raise AdapterCompositionError(
            f"Adapter {adapter_id!r} does more than add a low-rank delta (in {min(full)}), so its effect cannot be "
            f"multiplied by {weight:g}; give it the weight or strength 1.",
            {"adapter_id": adapter_id, "module": min(full)},
        )


def _check_pair(one: Composable, other: Composable) -> None:
    first, second = one.version.adapter_id, other.version.adapter_id
    ids = {"adapter_id": first, "other_adapter_id": second}
    if one.version == other.version:
        raise AdapterCompositionError(
            f"The adapter {one.version} is there twice, by its id, a digest prefix or an alias; name it once, with the "
            "sum of the weights.",
            {"adapter_id": first},
        )
    found, more = one.origin.report, other.origin.report
    clash = (found.full_modules & more.modules) | (more.full_modules & found.modules)
    if clash:
        raise AdapterCompositionError(
            f"The adapters {first!r} and {second!r} both change {min(clash)}, and not both by a low-rank delta, so "
            "there is no sum of them; name one of them in a request.",
            ids | {"module": min(clash)},
        )
    both_extend = found.vocab_size is not None and more.vocab_size is not None
    tokenizers = {id(tokenizer) for tokenizer in (one.tokenizer, other.tokenizer) if tokenizer is not None}
    if both_extend or len(tokenizers) > 1:
        raise AdapterCompositionError(
            f"The adapters {first!r} and {second!r} each have {'token ids' if both_extend else 'a tokenizer'} of their "
            "own, so a text means other tokens to each; name one of them in a request.",
            ids,
        )
