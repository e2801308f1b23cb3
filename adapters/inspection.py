"""What an adapter directory holds, for people: `lorikeet adapters inspect DIR`. Needs no server and no device."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .card import AdapterCard, read_card
from .checkpoint import AdaptedModule, Checkpoint, open_weights, read_config, read_module
from .config import AdapterConfig
from .delta import delta_norm
from .errors import AdapterInvalidError, ServingError
from .fingerprint import BaseFingerprint
from .golden import Golden, read_golden
from .packing import pack_adapter
from .report import AdapterReport, make_report
from .scaling import Scaling
from .sites import SiteTable
from .tensor_map import ModuleTensors, group_tensors, match_sites
from .weights_file import new_digest, read_header, read_payload


@dataclass(frozen=True, slots=True)
class InspectedModule:
    """One adapted linear.

    Attributes:
        scaling: rank and factor.
        delta_norm: Frobenius norm of what it adds to the weight; 0.0: it changes nothing.
    """

    scaling: Scaling
    delta_norm: float


@dataclass(slots=True)
class Inspection:
    """The result; whatever could be found out before a problem is filled in.

    Attributes:
        directory: real path.
        digest: hex SHA-256 that a server would show as its version; empty when it could not be computed.
        num_tensors: tensors in the weights file.
        weights_bytes: size of their payload.
        report: method, ranks and scalings; None when the problem came first.
        modules: module path -> what its tensors come to, in the file's order.
        card: what README.md says of the base.
        golden: its golden file; None: it has none, or the problem came first.
        warnings: what does not keep a server from serving it but may be a mistake.
        checked_against_base: whether names and shapes were compared with a base.
        problem: why a server would refuse it, or None.
    """

    directory: Path
    digest: str = ""
    num_tensors: int = 0
    weights_bytes: int = 0
    report: AdapterReport | None = None
    modules: Mapping[str, InspectedModule] = field(default_factory=dict)
    card: AdapterCard = field(default_factory=AdapterCard)
    golden: Golden | None = None
    warnings: tuple[str, ...] = ()
    checked_against_base: bool = False
    problem: ServingError | None = None


def inspect_directory(
    path: Path,
    site_table: SiteTable | None,
    base: BaseFingerprint | None = None,
    *,
    vocab_size: int | None = None,
    allow_other_base: bool = False,
    check_golden: bool = True,
) -> Inspection:
    """Check an adapter directory as a server would. A golden file is checked, not replayed.

    Args:
        path: the adapter directory; any directory of this machine, the caller is its user.
        site_table: the base to check against; None checks the files alone.
        base: its names and hash.
        vocab_size: width of its logits; None: a golden file is not compared with it.
        allow_other_base: another base is worth a warning only.
        check_golden: whether to look at its golden file.
    """
    found = Inspection(path.resolve())
    try:
        config, groups, modules = _read(found)
        if not any(module.delta_norm for module in found.modules.values()):
            raise AdapterInvalidError(
                "The adapter's delta is zero everywhere: it would answer exactly like the base. Was it saved before "
                "training? Loading it must be allowed explicitly (allow_zero)."
            )
        if site_table is not None:
            known = base or BaseFingerprint()
            match_sites(groups, config, site_table, known)
            # Packed as a server on a CPU would: finds values that scaling makes too large.
            checkpoint = Checkpoint(config, found.digest, modules, {})
            pack_adapter(checkpoint, site_table, dtype=torch.float32, pin_memory=False, allow_zero=True)
            card_sha256 = found.card.base_model_sha256
            _warn(found, known.check(config.trained_for, card_sha256, allow_other=allow_other_base))
        if check_golden:
            found.golden = read_golden(found.directory, digest=found.digest, vocab_size=vocab_size)
    except ServingError as error:
        found.problem = error
    found.checked_against_base = site_table is not None and found.problem is None
    return found


def _read(found: Inspection) -> tuple[AdapterConfig, list[ModuleTensors], dict[str, AdaptedModule]]:
    """Read the files and fill in what they hold, as far as it goes.

    Raises:
        ServingError: a server would refuse it.
    """
    config_bytes, config = read_config(found.directory)
    with open_weights(found.directory) as file:
        header = read_header(file)
        found.num_tensors, found.weights_bytes = len(header.tensors), header.payload_bytes
        hasher = new_digest()
        hasher.update(config_bytes)
        payload = read_payload(file, header, hasher)
    found.digest = hasher.hexdigest()
    found.card = read_card(found.directory)
    _warn(found, found.card.warning)
    groups = group_tensors(header.tensors, config)
    found.report = make_report(config, {group.module: group.scaling for group in groups})
    modules = {group.module: read_module(group, payload) for group in groups}
    found.modules = {name: InspectedModule(module.scaling, delta_norm(module)) for name, module in modules.items()}
    # A module of rank 0 is one that AdaLoRA pruned away.
    idle = [name for name, module in found.modules.items() if module.scaling.rank and not module.delta_norm]
    if idle:
        shown = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        _warn(found, f"{len(idle)} of {len(modules)} modules change nothing, their delta is zero: {shown}.")
    return config, groups, modules


def _warn(found: Inspection, warning: str | None) -> None:
    if warning is not None:
        found.warnings += (warning,)
