"""What an adapter directory holds, for people: `lorikeet adapters inspect DIR`. Needs no server and no device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .card import AdapterCard, read_card
from .checkpoint import Checkpoint, read_config
from .config import AdapterConfig
from .delta import delta_norm
from .errors import AdapterInvalidError, ServingError
from .fingerprint import BaseFingerprint
from .full_modules import FullModules, OwnWeights
from .golden import Golden, read_golden
from .modules import ModuleTable
from .packing import pack_adapter
from .payload import PayloadTensors
from .report import AdapterReport, make_report
from .scaling import Scaling
from .shards import open_weights
from .sites import SiteTable
from .tensor_map import Groups, Placement, group_tensors, place_tensors
from .tensor_names import Part
from .tensor_plan import TensorPlan
from .tokenizer_files import TokenizerFiles, read_tokenizer_files
from .weights_file import new_digest


@dataclass(frozen=True, slots=True)
class InspectedModule:
    """One module with a low-rank delta.

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
        modules: module path -> what its low-rank tensors come to, in the file's order.
        others: module path -> what else the files have of it, such as `weight [64, 32]`.
        card: what README.md says of the base.
        golden: its golden file; None: it has none, or the problem came first.
        tokenizer: what it ships of a tokenizer; a server parses it, which is not done here.
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
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    card: AdapterCard = field(default_factory=AdapterCard)
    golden: Golden | None = None
    tokenizer: TokenizerFiles = field(default_factory=TokenizerFiles)
    warnings: tuple[str, ...] = ()
    checked_against_base: bool = False
    problem: ServingError | None = None


def inspect_directory(
    path: Path,
    site_table: SiteTable | None = None,
    modules: ModuleTable | None = None,
    base: BaseFingerprint | None = None,
    *,
    vocab_size: int | None = None,
    allow_other_base: bool = False,
    check_golden: bool = True,
) -> Inspection:
    """Check an adapter directory as a server would. A golden file is checked, not replayed.

    The base's weights are not looked at, so a server still finds out what only they tell: DoRA norms of zero, biases of
    linears that have none, and embeddings that are just the base's.

    Args:
        path: the adapter directory; any directory of this machine, the caller is its user.
        site_table, modules: the base to check against; None checks the files alone.
        base: its names and hash.
        vocab_size: width of its logits; None: a golden file is not compared with it.
        allow_other_base: another base is worth a warning only.
        check_golden: whether to look at its golden file.
    """
    found = Inspection(path.resolve())
    try:
        config, groups, tensors = _read(found)
        changes = found.others or any(module.delta_norm for module in found.modules.values())
        if not (changes or config.use_dora or config.lora_bias):
            raise AdapterInvalidError(
                "The adapter's delta is zero everywhere: it would answer exactly like the base. Was it saved before "
                "training? Loading it must be allowed explicitly (allow_zero)."
            )
        if site_table is not None and modules is not None:
            known = base or BaseFingerprint()
            placement = place_tensors(groups, config, site_table, modules, known)
            # Packed as a server on a CPU would: finds values that scaling makes too large.
            packed = pack_adapter(
                Checkpoint(TensorPlan(config, placement, site_table, modules), found.digest, tensors, {}),
                _UnknownWeights(site_table, modules),
                dtype=torch.float32,
                pin_memory=False,
                allow_zero=True,
            )
            found.report = packed.report
            vocab_size = packed.vocab_size or vocab_size
            card_sha256 = found.card.base_model_sha256
            _warn(found, known.check(config.trained_for, card_sha256, allow_other=allow_other_base))
        if check_golden:
            found.golden = read_golden(found.directory, digest=found.digest, vocab_size=vocab_size)
    except ServingError as error:
        found.problem = error
    found.checked_against_base = site_table is not None and found.problem is None
    return found


class _UnknownWeights:
    """The `BaseWeights` of a base of which only the shapes are known: whatever lets an adapter through."""

    def __init__(self, sites: SiteTable, modules: ModuleTable) -> None:
        self._sites = sites
        self._head = modules.head

    def column_norms(self, module: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return torch.ones(lora_b.shape[0])

    def bias(self, module: str) -> Tensor | None:
        # Almost no head has a bias, and token rows are not served beside one.
        if module == self._head:
            return None
        site, index = self._sites.by_module[module]
        return torch.zeros(site.slices[index].out_features)

    def equals(self, module: str, parameter: str, tensor: Tensor) -> bool:
        return False


def _read(found: Inspection) -> tuple[AdapterConfig, Groups, Mapping[str, Tensor]]:
    """Read the files and fill in what they hold, as far as it goes.

    Raises:
        ServingError: a server would refuse it.
    """
    config_bytes, config = read_config(found.directory)
    with open_weights(found.directory) as weights:
        found.num_tensors, found.weights_bytes = len(weights.tensors), weights.payload_bytes
        hasher = new_digest()
        hasher.update(config_bytes)
        payloads = weights.read(hasher)
        tokenizer = read_tokenizer_files(found.directory)
        tokenizer.update(hasher)
        found.digest, found.tokenizer = hasher.hexdigest(), tokenizer
        found.card = read_card(found.directory)
        _warn(found, found.card.warning)
        _warn(found, tokenizer.warning)
        groups = group_tensors(weights.tensors, config)
        own = {module: OwnWeights(None, None) for module in groups.other}
        embedding = next(iter(groups.embedding_lora.values()), None)
        found.report = make_report(config, Placement(groups.lora, embedding, FullModules(own, {}, {}, None)))
        tensors = PayloadTensors(weights.headers, payloads)
    adapted = {**groups.lora, **groups.embedding_lora}
    found.modules = {name: InspectedModule(lora.scaling, delta_norm(lora, tensors)) for name, lora in adapted.items()}
    found.others = {module: tuple(_describe(parts)) for module, parts in _parts(groups)}
    # A module of rank 0 is one that AdaLoRA pruned away.
    idle = [name for name, module in found.modules.items() if module.scaling.rank and not module.delta_norm]
    if idle:
        shown = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        _warn(found, f"{len(idle)} of {len(adapted)} modules change nothing, their delta is zero: {shown}.")
    return config, groups, tensors


def _parts(groups: Groups) -> Iterator[tuple[str, Mapping[Part, tuple[int, ...]]]]:
    """Module -> shapes of what is no part of a low-rank delta, where there is something."""
    for module, lora in (*groups.lora.items(), *groups.embedding_lora.items()):
        vectors = {Part.MAGNITUDE: lora.magnitude, Part.B_BIAS: lora.b_bias}
        found = {part: info.shape for part, info in vectors.items() if info is not None}
        found |= {part: info.shape for part, info in groups.other.get(module, {}).items()}
        if found:
            yield module, found
    for module, parts in groups.other.items():
        if module not in groups.lora and module not in groups.embedding_lora:
            yield module, {part: info.shape for part, info in parts.items()}


def _describe(parts: Mapping[Part, tuple[int, ...]]) -> Iterator[str]:
    names = {Part.MAGNITUDE: "DoRA", Part.B_BIAS: "lora_bias", Part.TOKENS: "token rows", Part.BASE_WEIGHT: "weight"}
    for part, shape in parts.items():
        yield f"{names.get(part, part.value)} {list(shape)}"


def _warn(found: Inspection, warning: str | None) -> None:
    if warning is not None:
        found.warnings += (warning,)
