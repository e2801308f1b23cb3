"""Everything that can be checked before a merge begins: adapters, base, output, disk, packages, calibration text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from ..adapters.checkpoint import read_config
from ..adapters.info import LoadOptions
from ..adapters.merge.base import MergeBaseWeights
from ..adapters.merge.errors import MergeError
from ..adapters.merge.members import Member, check_members
from ..adapters.merge.merged import MergedModel, Parameter
from ..adapters.merge.progress import CancelCheck
from ..adapters.merge.staging import check_output, check_room
from ..adapters.merge.targets import CALIBRATED, Onto, Target
from ..adapters.merge.training_base import Choice, default_onto
from ..adapters.merge.weights import estimate_bytes
from ..adapters.reader import AdapterReader
from ..adapters.version import AdapterVersion
from .base.loader import read_eos_token_ids, read_tokenizer
from .errors import ConfigError
from .local_base import find_directory
from .merge_autoround import OFFLOADED, Calibration, calibrate, calibration_files, require_autoround
from .merge_config import bias_settings
from .merge_source import CheckpointWeights
from .tokenizers import Tokenizers

# Configs, tokenizer and card.
_SMALL_FILES: Final = 2**26
# Any adapter fits: what is bounded is a server's memory.
_MAX_BYTES: Final = 2**62


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What is to be merged.

    Attributes:
        model: directory or hub id of the base, or `demo`.
        adapters: directories.
        weights: one for each adapter, or none: each as it was trained.
        to: what the result is written as.
        out: the directory that it becomes.
        onto: None: what the adapters were trained on.
        allow_other_base: adapters may name another base, if their shapes fit.
        calibration: text file for targets that need it; None: what the adapters' folders carry.
        iterations: of auto-round, for each block of layers.
        base_names: other names that adapters may know the base by.
    """

    model: str
    adapters: tuple[Path, ...]
    to: Target
    out: Path
    weights: tuple[float, ...] = ()
    onto: Onto | None = None
    allow_other_base: bool = False
    calibration: Path | None = None
    iterations: int = 20
    base_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """A merge that can begin.

    Attributes:
        request: what was asked for; its `out` is absolute.
        base: the weights.
        members: the adapters.
        onto: what they are added to, and why.
        model: the merged tensors.
        parameters: all of them.
        settings: keys of config.json that give linears the biases that they need.
        calibration: text for auto-round as tokens, or None.
        check: ends the merge when it is cancelled.
    """

    request: MergeRequest
    base: CheckpointWeights
    members: tuple[Member, ...]
    onto: Choice
    model: MergedModel
    parameters: list[Parameter]
    settings: dict[str, bool]
    calibration: Calibration | None
    check: CancelCheck

    @property
    def warnings(self) -> list[str]:
        """What the caller should know of the adapters."""
        return [f"{m.version.adapter_id}: {m.origin.warning}" for m in self.members if m.origin.warning]


def plan_merge(request: MergeRequest) -> MergePlan:
    """Check a merge, and read its adapters. Writes nothing.

    Raises:
        ConfigError: weights that do not go with the adapters, or a package is missing.
        MergeError, MergeDiskError, MergeOutputExistsError, MergeUnwritableError: it cannot be done, or not there.
        BaseModelError: the base cannot be found or read.
        ServingError: an adapter that a server would refuse, for the same reasons.
    """
    request = _resolved(request)
    weights = _weights(request)
    check_output(request.out)
    texts: tuple[Path, ...] = ()
    if request.to in CALIBRATED:
        texts = calibration_files(request.calibration, request.adapters)
        require_autoround(request.to, texts)
    directory, name = find_directory(request.model, weights=True)
    base = CheckpointWeights(request.model, directory, name=name)
    base.fingerprint = replace(base.fingerprint, also=(*base.fingerprint.also, *request.base_names))
    calibration = calibrate(directory, texts, request.to) if texts else None
    check = CancelCheck()
    onto = _onto(request, base)
    base.onto = onto.onto
    members = _read_members(request, weights, base, check)
    check_members(members)
    model = MergedModel(base, members, check)
    settings, biases = bias_settings(base, model.new_biases)
    parameters = list(model.parameters(biases))
    check_room(request.out, _needed(parameters, request.to))
    return MergePlan(request, base, members, onto, model, parameters, settings, calibration, check)


def _resolved(request: MergeRequest) -> MergeRequest:
    for directory in request.adapters:
        if not directory.is_dir():
            raise ConfigError(f"--adapter names {directory}, which is no directory.")
    return replace(request, out=request.out.absolute(), adapters=tuple(d.resolve() for d in request.adapters))


def _weights(request: MergeRequest) -> tuple[float, ...]:
    count = len(request.adapters)
    if not count:
        raise ConfigError("There is no adapter to merge: give at least one (--adapter).")
    if request.weights and len(request.weights) != count:
        raise ConfigError(
            f"There are {count} adapters and {len(request.weights)} weights; give a --weight for each --adapter, in "
            "the same order, or none at all."
        )
    for weight in request.weights:
        if not math.isfinite(weight):
            raise ConfigError(f"A weight is {weight}; it must be a finite number.")
    return request.weights or (1.0,) * count


def _onto(request: MergeRequest, base: CheckpointWeights) -> Choice:
    if request.onto is Onto.ORIGINAL and base.is_quantized:
        raise MergeError(
            "The base is an NF4 checkpoint, so there are no 16-bit weights to merge onto: give the 16-bit model with "
            "--model, or merge with --onto nf4."
        )
    if request.onto is not None:
        return Choice(request.onto, "it was asked for")
    adapters = [(d.name, read_config(d)[1].trained_for, d) for d in request.adapters]
    return default_onto(adapters, has_original=not base.is_quantized)


def _read_members(
    request: MergeRequest, weights: Sequence[float], base: CheckpointWeights, check: CancelCheck
) -> tuple[Member, ...]:
    reader = AdapterReader(
        base.sites,
        base.modules,
        MergeBaseWeights(base, check),
        base.fingerprint,
        dtype=torch.float32,
        pin_memory=False,
        max_bytes=_MAX_BYTES,
    )
    options = LoadOptions(allow_other_base=request.allow_other_base)
    loaded = [reader.read(directory.name, directory, roots=(), options=options) for directory in request.adapters]
    members = tuple(
        Member(AdapterVersion(directory.name, each.digest), each, weight)
        for directory, each, weight in zip(request.adapters, loaded, weights, strict=True)
    )
    if any(each.tokenizer_files.files for each in loaded):
        return _with_tokenizers(members, base)
    return members


def _with_tokenizers(members: tuple[Member, ...], base: CheckpointWeights) -> tuple[Member, ...]:
    """Find out which tokenizers are not quite the base's, as a server does.

    Raises:
        AdapterInvalidError: no tokenizer can be made of an adapter's files, or its ids go beyond the vocabulary.
    """
    directory = base.checkpoint.directory
    tokenizer = read_tokenizer(directory)
    eos_token_ids = read_eos_token_ids(directory, base.config)
    tokenizers = Tokenizers(tokenizer, tokenizer.backend_tokenizer, eos_token_ids, base.modules.vocab_size)
    try:
        return tuple(
            replace(m, tokenizer=tokenizers.make(m.loaded.tokenizer_files, m.packed.vocab_size)) for m in members
        )
    finally:
        tokenizers.close()


def _needed(parameters: list[Parameter], to: Target) -> int:
    """Bytes of disk that a merge takes at most while it is under way."""
    if to in CALIBRATED:  # the 16-bit model lies beside what is made of it, and layers that auto-round has no room for
        merged = estimate_bytes(parameters, Target.BF16)
        return merged + int(merged * OFFLOADED) + estimate_bytes(parameters, Target.NF4) + _SMALL_FILES
    return estimate_bytes(parameters, to) + _SMALL_FILES
