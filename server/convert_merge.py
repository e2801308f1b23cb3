"""Between protobuf messages and merges."""

import math
import re
from typing import Any, Final, NamedTuple

from google.longrunning.operations_pb2 import Operation  # type: ignore[import-untyped]
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from ..adapters.carried_text import CARRIED_FILE
from ..adapters.merge.errors import MergeLossError
from ..adapters.merge.loss_rule import refuse_before
from ..adapters.merge.targets import CALIBRATED, Onto, Target
from ..adapters.reference import parse_reference
from ..protos.v1 import merges_pb2 as pb
from .errors import BadRequestError
from .field_errors import blaming
from .merge_operations import MergeOperation
from .status import status_message

MAX_MEMBERS: Final = 8
DEFAULT_ITERATIONS: Final = 20
MAX_ITERATIONS: Final = 1000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TO: Final = {pb.MERGE_TARGET_UNSPECIFIED: Target.BF16} | {
    pb.MergeTarget.Value(f"MERGE_TARGET_{target.name}"): target for target in Target
}
_ONTO: Final[dict[int, Onto | None]] = {pb.MERGE_ONTO_UNSPECIFIED: None} | {
    pb.MergeOnto.Value(f"MERGE_ONTO_{onto.name}"): onto for onto in Onto
}


class AskedMember(NamedTuple):
    """An adapter, as a client asks for it.

    Attributes:
        name: an id or an alias.
        reference: that, or `id@digest-prefix`.
        weight: finite.
    """

    name: str
    reference: str
    weight: float


def merge_members(request: pb.MergeAdapterRequest) -> list[AskedMember]:
    """The adapters of a request.

    Raises:
        BadRequestError, AdapterIdError, AdapterDigestError: name the field.
    """
    if not 1 <= len(request.adapters) <= MAX_MEMBERS:
        raise BadRequestError(
            f"adapters has {len(request.adapters)} entries; 1 to {MAX_MEMBERS} adapters can be merged together.",
            {"field": "adapters"},
        )
    found: list[AskedMember] = []
    for index, member in enumerate(request.adapters):
        with blaming(f"adapters[{index}].adapter_id"):
            name = parse_reference(member.adapter_id).name
        weight = member.weight if member.HasField("weight") else 1.0
        if not math.isfinite(weight):
            raise BadRequestError(
                f"adapters[{index}].weight is {weight}; allowed: finite numbers.",
                {"field": f"adapters[{index}].weight"},
            )
        found.append(AskedMember(name, member.adapter_id, weight))
    return found


def check_merge(request: pb.MergeAdapterRequest) -> None:
    """Check everything else that a message can show by itself.

    Raises:
        BadRequestError: names the field.
        MergeLossError: to NF4, and that is not accepted.
    """
    if not _NAME.fullmatch(request.output):
        raise BadRequestError(
            f"output is {request.output[:128]!r}; allowed: a directory's name of 1 to 128 letters, digits, dots, "
            "underscores and hyphens that begins with a letter or digit. It is made below the server's --merge-dir.",
            {"field": "output"},
        )
    for field, known in (("onto", _ONTO), ("to", _TO)):
        if getattr(request, field) not in known:
            raise BadRequestError(f"{field} is {getattr(request, field)}, which is no value of it.", {"field": field})
    if not 0 <= request.iterations <= MAX_ITERATIONS:
        raise BadRequestError(
            f"iterations is {request.iterations}; allowed: 1 to {MAX_ITERATIONS}, or 0 for {DEFAULT_ITERATIONS}.",
            {"field": "iterations"},
        )
    to = merge_target(request)
    if request.calibration and to not in CALIBRATED:
        raise BadRequestError(
            f"calibration is only for {', '.join(sorted(CALIBRATED))}, and the model is written as {to}.",
            {"field": "calibration"},
        )
    if request.unverified == any(text.strip() for text in request.texts):
        raise BadRequestError(
            "Give held-out text in texts, on which the merged model is compared with the unmerged adapters, or set "
            "unverified; one of them.",
            {"field": "texts"},
        )
    lossy = refuse_before(to)
    if lossy is not None and not request.accept_loss:
        raise MergeLossError(f"{lossy}. To do it all the same, set accept_loss.", {"field": "to"})


def check_calibration(request: pb.MergeAdapterRequest, is_carried: bool) -> None:
    """Check that there is a text to calibrate with, if one is needed.

    Args:
        request: checked otherwise.
        is_carried: one of its adapters carries a text.

    Raises:
        BadRequestError: there is none.
    """
    to = merge_target(request)
    if to in CALIBRATED and not request.calibration and not is_carried:
        raise BadRequestError(
            f"calibration is needed for {to}: give text of the kind that the adapter was trained on. What an adapter's "
            f"folder carries as {CARRIED_FILE} is used without that, but none of these had one when it was loaded.",
            {"field": "calibration"},
        )


def merge_target(request: pb.MergeAdapterRequest) -> Target:
    """What a checked request wants written."""
    return _TO[request.to]


def merge_onto(request: pb.MergeAdapterRequest) -> Onto | None:
    """What a checked request wants merged onto."""
    return _ONTO[request.onto]


def operation_message(operation: MergeOperation) -> Operation:
    """An operation, as clients see it."""
    message = Operation(name=operation.name, done=operation.is_over)
    message.metadata.Pack(_progress(operation))
    if operation.error is not None:
        message.error.CopyFrom(status_message(operation.error, operation.request_id))
    elif operation.report is not None:
        message.response.Pack(_report(operation.report))
    return message


def _progress(operation: MergeOperation) -> pb.MergeProgress:
    return pb.MergeProgress(
        output=operation.output,
        state=pb.MergeState.Value(f"MERGE_STATE_{operation.state.name}"),
        stage=operation.stage,
        done=operation.done,
        total=operation.total,
        unit=operation.unit,
        adapters=[
            pb.MergedAdapter(id=member.adapter_id, version=member.digest, weight=member.weight)
            for member in operation.members
        ],
        create_time=_timestamp(operation.created),
        start_time=_timestamp(operation.started),
        end_time=_timestamp(operation.ended),
    )


def _report(report: dict[str, Any]) -> pb.MergeReport:
    """The report of a merge's process: the fields have the same names on both sides."""
    message = pb.MergeReport()
    ParseDict(_finite(report), message, ignore_unknown_fields=True)
    return message


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have; protobuf's reader refuses them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _timestamp(unix_seconds: float) -> Timestamp | None:
    if not unix_seconds:
        return None
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(unix_seconds * 1e6))
    return timestamp
