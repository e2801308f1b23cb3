"""The tensors that rows of one step use in place of the base's, found once when the step is prepared.

Steps are long and adapters that have such tensors few, so what is found is a small mapping from the path of a module to
what some rows do there; a module that is not in it runs as ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from torch import Tensor

from .device_store import DeviceStore
from .packing import Override, OverrideKind


class SlotRows(NamedTuple):
    """Rows of a step that are beside each other, and the (device slot, weight) of their members; none: base rows."""

    rows: slice
    members: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class OwnTensor:
    """What some rows do at one module; see `OverrideKind`.

    Attributes:
        rows: of the flat batch; for the head, of those that it computes.
        kind: what they do.
        tensors: by the name of their region.
        token_ids: int64 [n] on the device, ascending; TOKENS only.
        weight: of the adapter in its composition; EMBEDDING_LORA is multiplied by it, of others it is 1.
    """

    rows: slice
    kind: OverrideKind
    tensors: Mapping[str, Tensor]
    token_ids: Tensor | None
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class OwnTensors:
    """Of one step.

    Attributes:
        by_module: path of a module, or of a slice of a site -> what rows do there.
        logits_width: columns of the logits; 0: as many as the base has token ids.
        unknown: (rows of the logits, the first token id that they do not know), where that is below the width.
        extends_input: token ids of some rows are beyond the base's embedding.
    """

    by_module: Mapping[str, list[OwnTensor]] = field(default_factory=dict)
    logits_width: int = 0
    unknown: Sequence[tuple[slice, int]] = ()
    extends_input: bool = False


NOTHING: Final = OwnTensors()


def collect_tensors(store: DeviceStore, flat: Sequence[SlotRows], sampled: Sequence[SlotRows]) -> OwnTensors:
    """Find the tensors of a step.

    Args:
        store: where they are; the result is right until extents move.
        flat: rows of the flat batch, in order.
        sampled: rows that the head computes, in order.
    """
    by_module: dict[str, list[OwnTensor]] = {}
    (head,) = store.site_table.sites[-1].slices
    for segments, is_head in ((flat, False), (sampled, True)):
        for segment in segments:
            for slot, weight in segment.members:
                for override in store.overrides.get(slot, ()):
                    if (override.module == head.module) == is_head:
                        own = _own_tensor(store, slot, override, segment.rows, weight)
                        by_module.setdefault(override.module, []).append(own)
    vocab = head.out_features
    known = [(segment.rows, _vocab_size(store, segment, vocab)) for segment in sampled]
    width = max([vocab, *(size for _, size in known)])
    return OwnTensors(
        by_module,
        logits_width=width,
        unknown=[(rows, size) for rows, size in known if size < width],
        extends_input=any(_vocab_size(store, segment, vocab) > vocab for segment in flat),
    )


def _own_tensor(store: DeviceStore, slot: int, override: Override, rows: slice, weight: float) -> OwnTensor:
    tensors = {name: store.override_tensor(slot, region) for name, region in override.regions.items()}
    return OwnTensor(rows, override.kind, tensors, override.token_ids, weight)


def _vocab_size(store: DeviceStore, segment: SlotRows, base: int) -> int:
    """The ids that the rows know are below this; of a composition one member at most has another vocabulary."""
    return next((store.vocab_sizes[slot] for slot, _ in segment.members if slot in store.vocab_sizes), base)
