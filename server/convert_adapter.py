"""From the adapter manager's plain types to protobuf messages."""

from google.protobuf.timestamp_pb2 import Timestamp

from ..adapters.info import AdapterInfo
from ..protos.v1 import adapters_pb2 as pb


def adapter_message(info: AdapterInfo) -> pb.Adapter:
    """One adapter, as clients see it."""
    return pb.Adapter(
        adapter_id=info.adapter_id,
        version=info.digest,
        state=pb.AdapterState.Value(f"ADAPTER_STATE_{info.state.name}"),
        tier=pb.AdapterTier.Value(f"ADAPTER_TIER_{info.tier.name}"),
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
    )


def _timestamp(unix_seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(unix_seconds * 1e6))
    return timestamp
