"""Disk -> host: everything between an adapter directory and a packed adapter. Runs on the manager's disk threads."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog
import torch

from .adapter_tokenizer import AdapterTokenizer
from .card import CARD_FILE, HASH_KEY, read_card
from .carried_text import CARRIED_FILE, read_carried
from .checkpoint import load_checkpoint
from .errors import AdapterMemoryError, AdapterMismatchError, ServingError
from .fingerprint import BaseFingerprint
from .golden import GOLDEN_FILE, Golden, read_golden, serialize_golden
from .info import LoadOptions
from .merge.training_base import said_in_card
from .modules import BaseWeights, ModuleTable
from .origin import Origin
from .packing import PackedAdapter, pack_adapter
from .sites import SiteTable
from .tensor_plan import TensorPlanner
from .tokenizer_files import TokenizerFiles

_log = structlog.get_logger(__name__)


class LoadedAdapter(NamedTuple):
    """One load's result.

    Attributes:
        digest: of config and weights.
        packed: as it goes to the device.
        origin: where it came from.
        files: name -> content in pieces: what was hashed, what proves it, and what merges want of its folder.
        golden: the prompts and logits that it carries, or None.
        tokenizer_files: what the adapter ships of a tokenizer.
        tokenizer: made of them by the server, where it is not quite the base's.
    """

    digest: str
    packed: PackedAdapter
    origin: Origin
    files: Mapping[str, tuple[bytes | memoryview, ...]]
    golden: Golden | None
    tokenizer_files: TokenizerFiles
    tokenizer: AdapterTokenizer | None = None


class AdapterReader:
    """Reads, checks and packs adapters for one base.

    Args:
        site_table: the base's sites.
        modules: its other modules.
        weights: its weights, for what is compared or computed with them.
        base: what adapters may say of the base that they were trained for.
        dtype: the arena's.
        pin_memory: whether copies go to a CUDA device.
        max_bytes: refuse larger adapters.
    """

    def __init__(
        self,
        site_table: SiteTable,
        modules: ModuleTable,
        weights: BaseWeights,
        base: BaseFingerprint,
        *,
        dtype: torch.dtype,
        pin_memory: bool,
        max_bytes: int,
    ) -> None:
        self._planner = TensorPlanner(site_table, modules, base)
        self._weights = weights
        self._base = base
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._max_elements = max_bytes // dtype.itemsize

    def read(
        self,
        adapter_id: str,
        directory: Path,
        *,
        roots: Sequence[Path],
        options: LoadOptions,
        name: str = "",
        settle_s: float = 0.0,
    ) -> LoadedAdapter:
        """Read one adapter. Whatever goes wrong becomes a ServingError.

        Args:
            adapter_id: for messages.
            directory: real path.
            roots: its files must really lie in one of these.
            options: what may be accepted.
            name: where it came from, as clients may see it.
            settle_s: how long its files must have been left alone.

        Raises:
            AdapterMemoryError, AdapterInvalidError, AdapterIncompatibleError: see load_checkpoint and pack_adapter.
            AdapterMismatchError: not the expected content.
            AdapterUnreadableError: the disk failed.
        """
        try:
            return self._read(directory, roots, options, name or directory.name, settle_s)
        except ServingError:
            raise
        except MemoryError:
            raise AdapterMemoryError(f"The host has no memory left to read adapter {adapter_id!r}.") from None
        except Exception:
            _log.exception("adapter_read_failed", adapter=adapter_id)
            raise ServingError(f"Adapter {adapter_id!r} could not be read; the server's log has the details.") from None

    def _read(
        self, directory: Path, roots: Sequence[Path], options: LoadOptions, name: str, settle_s: float
    ) -> LoadedAdapter:
        checkpoint = load_checkpoint(
            directory, self._planner, roots=roots, max_elements=self._max_elements, settle_s=settle_s
        )
        if options.expected_digest and checkpoint.digest != options.expected_digest:
            raise AdapterMismatchError(
                f"The content has version {checkpoint.digest}; {options.expected_digest} was expected.",
                {"version": checkpoint.digest},
            )
        packed = pack_adapter(
            checkpoint,
            self._weights,
            dtype=self._dtype,
            pin_memory=self._pin_memory,
            allow_zero=options.allow_zero,
            max_elements=self._max_elements,
        )
        tokenizer = checkpoint.tokenizer
        tokenizer.check_vocabulary(packed.vocab_size)
        card = read_card(directory, roots)
        warning = self._base.check(
            checkpoint.plan.config.trained_for, card.base_model_sha256, allow_other=options.allow_other_base
        )
        golden = read_golden(directory, roots, digest=checkpoint.digest)
        carried = read_carried(directory, roots)
        warnings = " ".join(filter(None, (warning, card.warning, tokenizer.warning, carried.warning))) or None
        origin = Origin(directory, packed.report, warnings, time.time(), name)
        files = checkpoint.files
        if golden is not None:
            files[GOLDEN_FILE] = (serialize_golden(golden),)
        kept = _kept_card(card.base_model_sha256, said_in_card(card.text))
        if kept:
            files[CARD_FILE] = (kept,)
        if carried.data:
            files[CARRIED_FILE] = (carried.data,)
        return LoadedAdapter(checkpoint.digest, packed, origin, files, golden, tokenizer)


def _kept_card(base_model_sha256: str | None, said: str) -> bytes:
    """What is kept of a card: what was checked, not what is in the file by now, and what a merge looks for in it."""
    front = "" if base_model_sha256 is None else f"---\n{HASH_KEY}: {base_model_sha256}\n---\n"
    return (front + (f"{said}\n" if said else "")).encode()
