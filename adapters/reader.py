"""Disk -> host: everything between an adapter directory and a packed adapter. Runs on the manager's disk threads."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import load_checkpoint
from .fingerprint import BaseFingerprint
from .packing import PackedAdapter, pack_adapter
from .report import Origin
from .sites import SiteTable


class LoadedAdapter(NamedTuple):
    """One load's result."""

    digest: str
    packed: PackedAdapter
    origin: Origin


class AdapterReader:
    """Reads, checks and packs adapters for one base.

    Args:
        site_table: the base's sites.
        base: its name.
        dtype: the arena's.
        pin_memory: whether copies go to a CUDA device.
        roots: where files must lie.
        max_bytes: refuse larger adapters.
    """

    def __init__(
        self,
        site_table: SiteTable,
        base: BaseFingerprint,
        *,
        dtype: torch.dtype,
        pin_memory: bool,
        roots: Sequence[Path],
        max_bytes: int,
    ) -> None:
        self._sites = site_table
        self._base = base
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._roots = tuple(roots)
        self._max_elements = max_bytes // dtype.itemsize

    def read(self, directory: Path, *, allow_zero: bool) -> LoadedAdapter:
        """Read one adapter.

        Args:
            directory: real path inside a root.
            allow_zero: accept a delta that is zero everywhere.

        Raises:
            ServingError: see load_checkpoint and pack_adapter.
        """
        checkpoint = load_checkpoint(
            directory, self._sites, self._base, roots=self._roots, max_elements=self._max_elements
        )
        packed = pack_adapter(
            checkpoint, self._sites, dtype=self._dtype, pin_memory=self._pin_memory, allow_zero=allow_zero
        )
        trained_for = checkpoint.config.trained_for
        warning = None
        if not self._base.matches(trained_for):
            warning = "Shapes fit, but the names of the bases differ." + self._base.explain(trained_for)
        return LoadedAdapter(checkpoint.digest, packed, Origin(directory, packed.report, warning, time.time()))
