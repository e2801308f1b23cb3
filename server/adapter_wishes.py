"""Which adapters a request names, and how strong each shall be. With `convert.py`, what sees protobuf."""

import math

from ..adapters.adaptation import MAX_MEMBERS, MAX_WEIGHT
from ..adapters.composition import Wish
from ..adapters.reference import parse_reference
from ..protos.v1 import generation_pb2 as pb
from .errors import BadRequestError
from .field_errors import blaming

# Requests that name adapters in the same fields.
AdaptedRequest = pb.GenerateRequest | pb.ScoreRequest

# Of a reference that may be malformed: as long as a well-formed one can be.
MAX_LOGGED = 128 + 1 + 64  # characters


def parse_wishes(request: AdaptedRequest) -> tuple[Wish, ...]:
    """The adapters of a request; none: the base.

    Raises:
        BadRequestError: adapter_id and adapters together, too many, or a weight out of range.
        AdapterIdError, AdapterDigestError: a reference is malformed.
    """
    if not request.adapters:
        return _single(request)
    if request.adapter_id:
        raise BadRequestError(
            "adapter_id and adapters are both set; leave adapter_id empty to have several answer together.",
            {"field": "adapter_id"},
        )
    if request.HasField("strength"):
        raise BadRequestError(
            "strength goes with adapter_id; in adapters every member has a weight of its own.", {"field": "strength"}
        )
    if len(request.adapters) > MAX_MEMBERS:
        raise BadRequestError(
            f"adapters has {len(request.adapters)} members; allowed: 1 to {MAX_MEMBERS}.", {"field": "adapters"}
        )
    return tuple(_member(f"adapters[{index}]", member) for index, member in enumerate(request.adapters))


def is_composed(request: AdaptedRequest) -> bool:
    """Whether the answer lists what was applied, with weights."""
    return bool(request.adapters) or request.HasField("strength")


def logged_wishes(request: AdaptedRequest) -> str:
    """What a request names, for the log: unchecked, bounded."""
    if request.adapters:
        named = [
            _shown(member.adapter_id, member.weight if member.HasField("weight") else 1.0)
            for member in request.adapters[:MAX_MEMBERS]
        ]
        return " + ".join(named) + (" + ..." if len(request.adapters) > MAX_MEMBERS else "")
    if request.HasField("strength"):
        return _shown(request.adapter_id, request.strength)
    return request.adapter_id[:MAX_LOGGED]


def _single(request: AdaptedRequest) -> tuple[Wish, ...]:
    if request.adapter_id:
        with blaming("adapter_id"):
            parse_reference(request.adapter_id)
        weight = _weight("strength", request.strength) if request.HasField("strength") else 1.0
        return (Wish(request.adapter_id, weight, "adapter_id"),)
    if request.HasField("strength"):
        raise BadRequestError(
            "strength is set without adapter_id; the base alone has none. Name an adapter, or leave strength out.",
            {"field": "strength"},
        )
    return ()


def _member(field: str, member: pb.WeightedAdapter) -> Wish:
    field_of_id = f"{field}.adapter_id"
    if not member.adapter_id:
        raise BadRequestError(f"{field_of_id} is empty; name an adapter.", {"field": field_of_id})
    with blaming(field_of_id):
        parse_reference(member.adapter_id)
    weight = _weight(f"{field}.weight", member.weight) if member.HasField("weight") else 1.0
    return Wish(member.adapter_id, weight, field_of_id)


def _weight(field: str, given: float) -> float:
    if not math.isfinite(given) or abs(given) > MAX_WEIGHT:
        raise BadRequestError(
            f"{field} is {given:g}; allowed: a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}.", {"field": field}
        )
    return given + 0.0  # -0.0 becomes 0.0, which is the same


def _shown(reference: str, weight: float) -> str:
    return f"{reference[:MAX_LOGGED]}:{weight:g}"
