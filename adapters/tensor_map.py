"""Which tensor of an adapter file belongs to which module of the base. Imports no torch.

Every tensor is either given a place or the adapter is refused, naming the tensor and the reason; so is a module that
the config targets and the file lacks. Works on the header alone: a wrong file is refused before its payload is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .config import AdapterConfig, Method
from .errors import AdapterInvalidError
from .fingerprint import BaseFingerprint
from .full_modules import FullModules, place_full_modules
from .modules import ModuleTable
from .scaling import Scaling, resolve_scaling
from .sites import SiteTable
from .tensor_names import Part, about, parse_name, refuse
from .weights_file import TensorInfo

_LORA_PARTS = frozenset({Part.A, Part.B, Part.E, Part.B_BIAS, Part.EMBEDDING_A, Part.EMBEDDING_B, Part.MAGNITUDE})


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """The low-rank tensors of one module.

    Attributes:
        module: path in the base, e.g. `model.layers.0.self_attn.q_proj`.
        scaling: rank and factor that the config gives it.
        lora_a: [rank, in_features]; of an embedding [rank, rows].
        lora_b: [out_features, rank]; of an embedding [dim, rank].
        lora_e: [rank, 1] for AdaLoRA, else None.
        magnitude: DoRA's, [out_features], else None.
        b_bias: lora_bias, [out_features], else None.
    """

    module: str
    scaling: Scaling
    lora_a: TensorInfo
    lora_b: TensorInfo
    lora_e: TensorInfo | None
    magnitude: TensorInfo | None
    b_bias: TensorInfo | None


@dataclass(frozen=True, slots=True)
class Groups:
    """An adapter's tensors by module, before they are compared with a base.

    Attributes:
        lora: of linears.
        embedding_lora: of embeddings.
        other: module -> whatever else there is of it.
    """

    lora: Mapping[str, LoraTensors]
    embedding_lora: Mapping[str, LoraTensors]
    other: Mapping[str, Mapping[Part, TensorInfo]]

    @property
    def scalings(self) -> dict[str, Scaling]:
        """Rank and factor of every module with low-rank tensors."""
        return {module: group.scaling for module, group in (*self.lora.items(), *self.embedding_lora.items())}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every tensor goes.

    Attributes:
        lora: slice of a site -> its low-rank tensors.
        embedding_lora: those of the input embedding, or None.
        full: everything that is no low-rank delta.
    """

    lora: Mapping[str, LoraTensors]
    embedding_lora: LoraTensors | None
    full: FullModules

    @property
    def scalings(self) -> dict[str, Scaling]:
        """Rank and factor of every module with low-rank tensors."""
        embedding = [self.embedding_lora] if self.embedding_lora is not None else []
        return {group.module: group.scaling for group in (*self.lora.values(), *embedding)}


def group_tensors(tensors: Mapping[str, TensorInfo], config: AdapterConfig) -> Groups:
    """Group the tensors by module and check them against the config, without looking at a base.

    Raises:
        AdapterIncompatibleError: a kind of tensor that is not served.
        AdapterInvalidError: incomplete groups, shapes that contradict the config, or no tensor at all.
    """
    lora: dict[str, dict[Part, TensorInfo]] = {}
    other: dict[str, dict[Part, TensorInfo]] = {}
    for name, info in tensors.items():
        key = parse_name(name)
        group = (lora if key.part in _LORA_PARTS else other).setdefault(key.module, {})
        if key.part in group:
            raise AdapterInvalidError(
                f"Tensors {group[key.part].name!r} and {name!r} are both {key.part} of the same module.", about(name)
            )
        group[key.part] = info
    if not tensors:
        raise AdapterInvalidError("The file has no tensors: no module would be adapted.")
    embeddings = {m: g for m, g in lora.items() if Part.EMBEDDING_A in g or Part.EMBEDDING_B in g}
    return Groups(
        {m: _complete(m, g, config, (Part.A, Part.B)) for m, g in lora.items() if m not in embeddings},
        {m: _complete(m, g, config, (Part.EMBEDDING_A, Part.EMBEDDING_B)) for m, g in embeddings.items()},
        other,
    )


def place_tensors(
    groups: Groups, config: AdapterConfig, sites: SiteTable, modules: ModuleTable, base: BaseFingerprint
) -> Placement:
    """Check that every tensor fits a module of the base and that no targeted module lacks its own.

    Raises:
        AdapterIncompatibleError: an unknown module, another shape, or a module the config does not name.
        AdapterInvalidError: the config names a module of the base that the file lacks.
    """
    full = place_full_modules(groups.other, config, sites, modules, base.explain(config.trained_for))
    for group in groups.lora.values():
        _check_linear(group, config, sites, modules, full, base)
    for group in groups.embedding_lora.values():
        _check_embedding(group, config, modules, full, base)
    adapted = {*groups.lora, *groups.embedding_lora}
    if config.targets.explicit and config.method in (Method.LORA, Method.ADALORA):
        skipped = {modules.head, modules.embedding} if config.targets.all_linear else set()
        for module in (*sites.by_module, modules.embedding):
            if module not in adapted and module not in skipped and config.targets(module):
                raise AdapterInvalidError(
                    f"The config targets {module}, but the file has no tensors for it; is the file complete?",
                    {"module": module},
                )
    return Placement(groups.lora, groups.embedding_lora.get(modules.embedding), full)


def _check_linear(
    group: LoraTensors,
    config: AdapterConfig,
    sites: SiteTable,
    modules: ModuleTable,
    full: FullModules,
    base: BaseFingerprint,
) -> None:
    module = group.module
    explained = base.explain(config.trained_for)
    if module == modules.embedding:
        raise refuse(group.lora_a.name, "embeddings are adapted by lora_embedding_A and lora_embedding_B")
    if module not in sites.by_module:
        raise refuse(group.lora_a.name, f"the base has no linear {module[:256]!r}.{explained}")
    is_tied_head = config.ties_weights and modules.is_tied and module == modules.head
    if not (is_tied_head or config.targets(module)):
        raise refuse(group.lora_a.name, "the config's target_modules does not name its module; PEFT would drop it")
    site, index = sites.by_module[module]
    out_features = full.rows(module, site.slices[index].out_features)
    fits = f"the base's {module} maps {site.in_features} to {out_features} features"
    for info, got, width in (
        (group.lora_a, group.lora_a.shape[1], site.in_features),
        (group.lora_b, group.lora_b.shape[0], out_features),
    ):
        if got != width:
            raise refuse(info.name, f"it has shape {list(info.shape)}, but {fits}.{explained}")
    for vector in (group.magnitude, group.b_bias):
        if vector is not None and vector.shape != (out_features,):
            raise refuse(vector.name, f"it has shape {list(vector.shape)}, but {fits}: it must be [{out_features}]")
    if site.is_head and group.b_bias is not None and module in full.whole:
        raise refuse(group.b_bias.name, "lora_bias is not served on a head with weights of its own")


def _check_embedding(
    group: LoraTensors, config: AdapterConfig, modules: ModuleTable, full: FullModules, base: BaseFingerprint
) -> None:
    module = group.module
    if module != modules.embedding:
        raise refuse(group.lora_a.name, f"the base's input embedding is {modules.embedding}, not {module[:256]!r}")
    if group.magnitude is not None:
        raise refuse(group.magnitude.name, "DoRA on embeddings is not served; leave the embedding out of DoRA")
    if not config.targets(module):
        raise refuse(group.lora_a.name, "the config's target_modules does not name its module; PEFT would drop it")
    rows, dim = modules.by_path[module].shapes["weight"]
    rows = full.rows(module, rows)
    for info, got, width in (
        (group.lora_a, group.lora_a.shape[1], rows),
        (group.lora_b, group.lora_b.shape[0], dim),
    ):
        if got != width:
            raise refuse(
                info.name,
                f"it has shape {list(info.shape)}, but the embedding has {rows} rows of {dim}."
                + base.explain(config.trained_for),
            )
    if module in full.tokens and module not in full.whole:
        raise refuse(
            full.tokens[module].rows.name, "LoRA and trained token rows on one module are not served (nor by PEFT)"
        )


def _complete(
    module: str, group: Mapping[Part, TensorInfo], config: AdapterConfig, pair: tuple[Part, Part]
) -> LoraTensors:
    some = next(iter(group.values()))
    is_embedding = pair[0] is Part.EMBEDDING_A
    if config.method not in (Method.LORA, Method.ADALORA):
        raise refuse(some.name, f"it belongs to LoRA, but peft_type is {config.method}")
    wanted = [*pair, *([Part.E] if config.method is Method.ADALORA else [])]
    # Said of the embedding itself later on.
    wanted += [Part.MAGNITUDE] if config.use_dora and not is_embedding else []
    wanted += [Part.B_BIAS] if config.lora_bias and not is_embedding else []
    said_by = {Part.MAGNITUDE: "use_dora", Part.B_BIAS: "lora_bias"}
    for part in wanted:
        if part not in group:
            why = f", though {said_by[part]} is true" if part in said_by else ""
            raise AdapterInvalidError(f"Tensor {some.name!r} has no {part} beside it{why}.", about(some.name))
    for part, is_read, key in (
        (Part.E, config.method is Method.ADALORA, "AdaLoRA, but peft_type is LORA"),
        (Part.MAGNITUDE, config.use_dora, "DoRA, but use_dora is false in the config"),
        (Part.B_BIAS, config.lora_bias and not is_embedding, "lora_bias, which the config does not set for it"),
    ):
        if part in group and not is_read:
            raise refuse(group[part].name, f"it belongs to {key}")
    scaling = resolve_scaling(config, module)
    lora_a, lora_b, lora_e = group[pair[0]], group[pair[1]], group.get(Part.E)
    for info, dim in ((lora_a, 0), (lora_b, 1)):
        if len(info.shape) != 2:
            raise AdapterInvalidError(
                f"Tensor {info.name!r} has shape {list(info.shape)}; it must be a matrix.", about(info.name)
            )
        if info.shape[dim] != scaling.rank:
            raise AdapterInvalidError(
                f"Tensor {info.name!r} has rank {info.shape[dim]} (shape {list(info.shape)}), but the config gives "
                f"{module} rank {scaling.rank}.",
                about(info.name),
            )
    if lora_e is not None and lora_e.shape != (scaling.rank, 1):
        raise AdapterInvalidError(
            f"Tensor {lora_e.name!r} has shape {list(lora_e.shape)}; it must be [{scaling.rank}, 1].",
            about(lora_e.name),
        )
    extra = next((i for part, i in group.items() if part not in wanted and part is not Part.MAGNITUDE), None)
    if extra is not None:
        raise refuse(extra.name, "a module is adapted either as a linear or as an embedding")
    return LoraTensors(module, scaling, lora_a, lora_b, lora_e, group.get(Part.MAGNITUDE), group.get(Part.B_BIAS))
