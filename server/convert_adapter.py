"""Between protobuf messages and the adapter manager's plain types."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from ..adapters.errors import AdapterDigestError, AdapterSourceError
from ..adapters.info import AdapterInfo, AdapterState, AliasInfo, LoadOptions, LoadPlan, Tier
from ..adapters.reference import MIN_PREFIX, parse_reference
from ..protos.v1 import adapters_pb2 as pb
from .errors import BadRequestError
from .field_errors import blaming

MAX_TARGETS: Final = 8
MAX_SOURCE_LENGTH: Final = 4096  # characters of a path or URI
DIGEST_LENGTH: Final = 64
_HEX: Final = re.compile(r"[0-9a-f]*")

MaySee = Callable[[str], bool]


class AskedTarget(NamedTuple):
    """A target of an alias, as a client asks for it.

    Attributes:
        name: the adapter's id.
        reference: `id` or `id@digest-prefix`.
        weight: above 0.
    """

    name: str
    reference: str
    weight: float


def adapter_message(info: AdapterInfo, may_see: MaySee) -> pb.Adapter:
    """One adapter, as a client sees it.

    Args:
        info: the version.
        may_see: whether the client may know an alias; others are left out.
    """
    return pb.Adapter(
        adapter_id=info.adapter_id,
        version=info.digest,
        state=_state_value(info.state),
        tier=_tier_value(info.tier),
        size_bytes=info.bytes,
        max_rank=info.max_rank,
        slices=[
            pb.AdapterSlice(module=module, rank=rank, scaling=scaling)
            for module, (rank, scaling) in sorted(info.slices.items())
        ],
        in_flight_requests=info.in_flight,
        error=info.error or "",
        load_time=_timestamp(info.loaded_at),
        source=info.source,
        method=info.method,
        warning=info.warning or "",
        current=info.current,
        pinned_tier=pb.ADAPTER_TIER_UNSPECIFIED if info.pinned is None else _tier_value(info.pinned),
        aliases=[alias for alias in info.aliases if may_see(alias)],
        proof=info.proof,
        trained_for=info.trained_for,
        module_count=info.num_modules,
    )


def brief_message(info: AdapterInfo) -> pb.Adapter:
    """Which version it is and where, and nothing else about it."""
    return pb.Adapter(
        adapter_id=info.adapter_id, version=info.digest, state=_state_value(info.state), tier=_tier_value(info.tier)
    )


def plan_message(plan: LoadPlan, may_see: MaySee) -> pb.LoadPlan:
    """What a load would do. Of an adapter that the client may not see, it learns only that a copy would go."""
    return pb.LoadPlan(
        is_new=plan.is_new,
        host_bytes=plan.host_bytes,
        device_bytes=plan.device_bytes,
        fits_host=plan.fits_host,
        fits_device=plan.fits_device,
        evictions=[
            pb.AdapterEviction(adapter_id=eviction.adapter_id, version=eviction.digest, tier=_tier_value(eviction.tier))
            if may_see(eviction.adapter_id)
            else pb.AdapterEviction(tier=_tier_value(eviction.tier))
            for eviction in plan.evictions
        ],
    )


def alias_message(alias: AliasInfo) -> pb.Alias:
    """One alias. Who may see it sees its targets too: every answer through it names one of them."""
    return pb.Alias(
        name=alias.name,
        targets=[
            pb.AliasTarget(adapter_id=target.adapter_id, version=target.digest, weight=target.weight)
            for target in alias.targets
        ],
    )


def load_source(request: pb.LoadAdapterRequest) -> str | Path | None:
    """Where to load from: a URI as a string, a path, or None for the folder of that name.

    Raises:
        BadRequestError, AdapterSourceError: name the field.
    """
    for field, value in (("path", request.path), ("source", request.source)):
        if len(value) > MAX_SOURCE_LENGTH:
            raise BadRequestError(
                f"{field} has {len(value)} characters; allowed: at most {MAX_SOURCE_LENGTH}.", {"field": field}
            )
    if request.path and request.source:
        raise BadRequestError(
            "path and source are both set; give a folder as path or a URI as source, or neither for the folder named "
            f"{request.adapter_id!r}.",
            {"field": "source"},
        )
    if request.source and "://" not in request.source:
        raise AdapterSourceError(
            f"source is {request.source[:128]!r}, which is no URI; give hf://org/name[@revision], s3://, gs://, "
            "http:// or https://, or a folder of the server as path.",
            {"field": "source"},
        )
    return request.source or (Path(request.path) if request.path else None)


def load_options(request: pb.LoadAdapterRequest) -> LoadOptions:
    """What a load may accept or insist on.

    Raises:
        AdapterDigestError: expected_version is no full digest.
    """
    return LoadOptions(
        allow_zero=request.allow_zero,
        allow_other_base=request.allow_other_base,
        expected_digest=_digest("expected_version", request.expected_version, DIGEST_LENGTH),
    )


def digest_prefix(field: str, text: str) -> str:
    """A digest or its beginning, in lower case; empty stays empty.

    Raises:
        AdapterDigestError: names the field.
    """
    return _digest(field, text, MIN_PREFIX)


def requested_tier(tier: int) -> Tier:
    """The tier that something is brought to; unspecified is the device.

    Raises:
        BadRequestError: it is the disk, or no tier.
    """
    if tier in (pb.ADAPTER_TIER_UNSPECIFIED, pb.ADAPTER_TIER_DEVICE):
        return Tier.DEVICE
    if tier == pb.ADAPTER_TIER_HOST:
        return Tier.HOST
    shown = "the disk, where every adapter is already" if tier == pb.ADAPTER_TIER_DISK else f"{tier}, which is no tier"
    raise BadRequestError(
        f"tier is {shown}; allowed: ADAPTER_TIER_HOST and ADAPTER_TIER_DEVICE (also if unspecified).", {"field": "tier"}
    )


def alias_targets(alias: pb.Alias) -> list[AskedTarget]:
    """The targets of an alias that is to be set. That its name is well-formed is checked elsewhere.

    Raises:
        BadRequestError, AdapterIdError, AdapterDigestError: name the field.
    """
    if not 1 <= len(alias.targets) <= MAX_TARGETS:
        raise BadRequestError(
            f"alias.targets has {len(alias.targets)} entries; an alias leads to 1 to {MAX_TARGETS} versions.",
            {"field": "alias.targets"},
        )
    targets: list[AskedTarget] = []
    for index, message in enumerate(alias.targets):
        target = _target(f"alias.targets[{index}]", message)
        for earlier, other in enumerate(targets):
            if _may_be_same(target.reference, other.reference):
                raise BadRequestError(
                    f"alias.targets[{index}] is {target.reference[:150]}, as is alias.targets[{earlier}]; name each "
                    "version once and give it the sum of the weights.",
                    {"field": f"alias.targets[{index}]"},
                )
        targets.append(target)
    if not math.isfinite(sum(target.weight for target in targets)):
        raise BadRequestError("The weights' sum is not finite; give smaller ones.", {"field": "alias.targets"})
    return targets


def _target(field: str, message: pb.AliasTarget) -> AskedTarget:
    with blaming(f"{field}.adapter_id"):
        name, prefix = parse_reference(message.adapter_id)
    version = _digest(f"{field}.version", message.version, DIGEST_LENGTH)
    if version and not version.startswith(prefix):
        raise BadRequestError(
            f"{field}.adapter_id is {message.adapter_id}, but its version begins with {version[:12]}; give one.",
            {"field": f"{field}.version"},
        )
    weight = message.weight or 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise BadRequestError(
            f"{field}.weight is {weight:g}; allowed: any finite number above 0, or 0 for 1.",
            {"field": f"{field}.weight"},
        )
    digest = version or prefix
    return AskedTarget(name, f"{name}@{digest}" if digest else name, weight)


def _may_be_same(one: str, other: str) -> bool:
    """Whether two references can only mean one version: the same, or prefixes of which one begins with the other."""
    return one == other or ("@" in one and "@" in other and (one.startswith(other) or other.startswith(one)))


def _digest(field: str, text: str, min_length: int) -> str:
    digest = text.lower()
    if digest and not (min_length <= len(digest) <= DIGEST_LENGTH and _HEX.fullmatch(digest)):
        length = f"{DIGEST_LENGTH}" if min_length == DIGEST_LENGTH else f"{min_length} to {DIGEST_LENGTH}"
        raise AdapterDigestError(
            f"{field} is {text[:80]!r} ({len(text)} characters); allowed: {length} hex digits, or empty.",
            {"field": field},
        )
    return digest


def _state_value(state: AdapterState) -> "pb.AdapterState.ValueType":
    return pb.AdapterState.Value(f"ADAPTER_STATE_{state.name}")


def _tier_value(tier: Tier) -> "pb.AdapterTier.ValueType":
    return pb.AdapterTier.Value(f"ADAPTER_TIER_{tier.name}")


def _timestamp(unix_seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(unix_seconds * 1e6))
    return timestamp
