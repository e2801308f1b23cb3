"""The adapters of a merge, read and packed exactly as a server reads and packs them, in float32."""

from dataclasses import dataclass

from ..adapter_tokenizer import AdapterTokenizer
from ..composition_rules import check_sum
from ..origin import Origin
from ..packing import PackedAdapter
from ..reader import LoadedAdapter
from ..version import AdapterVersion


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One adapter and what its effect is multiplied by.

    Attributes:
        version: its name and digest.
        loaded: what was read; packed in float32.
        weight: finite.
        tokenizer: its own, where that is not quite the base's.
    """

    version: AdapterVersion
    loaded: LoadedAdapter
    weight: float
    tokenizer: AdapterTokenizer | None = None

    @property
    def origin(self) -> Origin:
        """Where it came from, and what it changes."""
        return self.loaded.origin

    @property
    def packed(self) -> PackedAdapter:
        """Its tensors."""
        return self.loaded.packed


def check_members(members: tuple[Member, ...]) -> None:
    """Raise unless there is a sum of these adapters with these weights: the rules are serving's.

    Raises:
        AdapterCompositionError: see `composition_rules.check_composition`.
    """
    check_sum([(member, member.weight) for member in members])
