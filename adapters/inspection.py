"""What an adapter directory holds, for people: `lorikeet adapters inspect DIR`. Needs no server and no device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import load_checkpoint, open_weights, read_config
from .errors import ServingError
from .fingerprint import BaseFingerprint
from .packing import pack_adapter
from .report import AdapterReport, make_report
from .sites import SiteTable
from .tensor_map import group_tensors
from .weights_file import new_digest, read_header, read_payload


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result; whatever could be found out before a problem is filled in.

    Attributes:
        digest: hex SHA-256 that a server would show as its version; empty when it could not be computed.
        num_tensors: tensors in the weights file.
        weights_bytes: size of their payload.
        report: method, ranks and scalings; None when the problem came first.
        checked_against_base: whether names and shapes were compared with a base.
        problem: why a server would refuse it, or None.
    """

    digest: str
    num_tensors: int
    weights_bytes: int
    report: AdapterReport | None
    checked_against_base: bool
    problem: ServingError | None


def inspect_directory(
    path: Path, site_table: SiteTable | None, base: BaseFingerprint | None = None, *, allow_zero: bool = False
) -> Inspection:
    """Check an adapter directory as a server would.

    Args:
        path: the adapter directory; any directory of this machine, the caller is its user.
        site_table: the base to check against; None checks the files alone.
        base: the base's name, for messages.
        allow_zero: do not report a zero delta.
    """
    directory = path.resolve()
    digest = ""
    num_tensors = weights_bytes = 0
    report: AdapterReport | None = None
    problem: ServingError | None = None
    try:
        config_bytes, config = read_config(directory)
        with open_weights(directory) as file:
            header = read_header(file)
            num_tensors, weights_bytes = len(header.tensors), header.payload_bytes
            hasher = new_digest()
            hasher.update(config_bytes)
            read_payload(file, header, hasher)
        digest = hasher.hexdigest()
        groups = group_tensors(header.tensors, config)
        report = make_report(config, {group.module: group.scaling for group in groups})
        if site_table is not None:
            checkpoint = load_checkpoint(directory, site_table, base or BaseFingerprint())
            pack_adapter(checkpoint, site_table, dtype=torch.float32, pin_memory=False, allow_zero=allow_zero)
    except ServingError as error:
        problem = error
    return Inspection(digest, num_tensors, weights_bytes, report, site_table is not None and problem is None, problem)
