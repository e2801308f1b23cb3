"""Which tensors of an adapter file replace something of a module: weights, biases, token rows. Imports no torch.

What PEFT does when it loads such a file is the rule. A module in modules_to_save has weights of its own. The weight of
an embedding or head that is not there is the base's as it was when the adapter was saved, so it replaces the base's in
both places where the base ties them. New biases replace the base's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .config import ANY_MODULE, AdapterConfig, Biases, Method
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .modules import ModuleKind, ModuleTable
from .sites import SiteTable
from .tensor_names import Part, about, refuse
from .weights_file import TensorInfo

_SAVE_BOTH: Final = "save both with the adapter (modules_to_save, or save_embedding_layers=True)"

Parts = Mapping[Part, TensorInfo]


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """Weights that run in place of a module's own.

    Attributes:
        weight: None: the base's (norms of which only the bias was trained).
        bias: None: the base's, or none.
        may_be_base: it may just be a copy of the base's weight, and is left out then.
    """

    weight: TensorInfo | None
    bias: TensorInfo | None
    may_be_base: bool = False


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Trained rows of an embedding or head.

    Attributes:
        rows: [n, dim], in the order of `ids`.
        ids: token ids, each once.
    """

    rows: TensorInfo
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FullModules:
    """What an adapter has beside low-rank deltas.

    Attributes:
        whole: module, or slice of a site -> its own weights.
        biases: slice of a site -> the bias that replaces the base's.
        tokens: embedding or head -> its rows.
        vocab_size: token ids are below it; None: as many as the base has.
    """

    whole: Mapping[str, OwnWeights]
    biases: Mapping[str, TensorInfo]
    tokens: Mapping[str, TokenRows]
    vocab_size: int | None

    def rows(self, module: str, default: int) -> int:
        """Rows of a module's weight: its own if it has one, else the default."""
        own = self.whole.get(module)
        return default if own is None or own.weight is None else own.weight.shape[0]


def place_full_modules(
    groups: Mapping[str, Parts], config: AdapterConfig, sites: SiteTable, modules: ModuleTable, explained: str
) -> FullModules:
    """Find the module of every tensor that is no part of a low-rank delta.

    Args:
        groups: module -> its tensors.
        config: the adapter's.
        sites, modules: the base's.
        explained: a sentence about bases, for messages.

    Raises:
        AdapterIncompatibleError, AdapterInvalidError: as `tensor_map.place_tensors`.
    """
    whole: dict[str, OwnWeights] = {}
    biases: dict[str, TensorInfo] = {}
    tokens: dict[str, TokenRows] = {}
    for module, parts in groups.items():
        shapes = _shapes(module, sites, modules)
        if shapes is None:
            raise refuse(next(iter(parts.values())).name, f"the base has no module {module[:256]!r}.{explained}")
        own, bias = _own_weights(module, parts, config, sites, modules)
        if own is not None:
            whole[module] = own
            _check_shapes(module, own, shapes, is_vocabulary=module in (modules.embedding, modules.head))
        if bias is not None:
            biases[module] = bias
            _check_shape(bias, shapes["bias"], module)
        if Part.TOKENS in parts:
            tokens[module] = _token_rows(module, parts[Part.TOKENS], config, modules, shapes["weight"][1])
    if modules.is_tied:
        _tie(whole, tokens, groups, config, modules)
    _check_complete(whole, tokens, config, sites, modules)
    return FullModules(whole, biases, tokens, _vocab_size(whole, tokens, modules))


def _shapes(module: str, sites: SiteTable, modules: ModuleTable) -> Mapping[str, tuple[int, ...]] | None:
    """Shapes of a module's parameters; None: the base has no such module. Any slice of a site may have a bias."""
    if module in modules.by_path:
        return modules.by_path[module].shapes
    if module not in sites.by_module:
        return None
    site, index = sites.by_module[module]
    out_features = site.slices[index].out_features
    return {"weight": (out_features, site.in_features), "bias": (out_features,)}


def _own_weights(
    module: str, parts: Parts, config: AdapterConfig, sites: SiteTable, modules: ModuleTable
) -> tuple[OwnWeights | None, TensorInfo | None]:
    """The weights of one module, or the bias of one slice."""
    weight, bias = parts.get(Part.WEIGHT), parts.get(Part.BIAS)
    if config.has_whole(module):
        if Part.BASE_WEIGHT in parts:
            raise refuse(parts[Part.BASE_WEIGHT].name, "its module is in modules_to_save, which has no adapter on it")
        weight, bias = weight or parts.get(Part.COPIED_WEIGHT), bias or parts.get(Part.COPIED_BIAS)
        if weight is None and bias is not None:
            raise AdapterInvalidError(f"Tensor {bias.name!r} has no weight beside it.", about(bias.name))
        return (None if weight is None else OwnWeights(weight, bias)), None
    for part in (Part.COPIED_WEIGHT, Part.COPIED_BIAS, Part.ORIGINAL_WEIGHT, Part.ORIGINAL_BIAS):
        if part in parts:
            raise refuse(parts[part].name, "the config's modules_to_save does not name its module")
    if weight is not None and Part.BASE_WEIGHT in parts:
        raise AdapterInvalidError(
            f"Tensors {weight.name!r} and {parts[Part.BASE_WEIGHT].name!r} are both the weight of the same module.",
            about(weight.name),
        )
    weight = weight or parts.get(Part.BASE_WEIGHT)
    if weight is not None and module not in (modules.embedding, modules.head):
        raise refuse(weight.name, "the config's modules_to_save does not name its module")
    if bias is not None:
        is_norm = module in modules.by_path and modules.by_path[module].kind is ModuleKind.NORM
        is_read = config.biases is Biases.ALL or (config.biases is Biases.LORA_ONLY and config.targets(module))
        if not is_read or (is_norm and "bias" not in modules.by_path[module].shapes):
            raise refuse(bias.name, f"bias is {config.biases.value!r} in the config, so the file has no such bias")
        if is_norm:
            return OwnWeights(None, bias), None
    if weight is None:
        return None, bias
    if bias is not None:
        return OwnWeights(weight, bias, may_be_base=False), None
    return OwnWeights(weight, None, may_be_base=True), None


def _token_rows(module: str, rows: TensorInfo, config: AdapterConfig, modules: ModuleTable, dim: int) -> TokenRows:
    if module not in (modules.embedding, modules.head):
        raise refuse(rows.name, "only the input embedding and the output head have rows for tokens")
    ids = _ids_of(module, config, modules)
    if ids is None:
        key = "token_indices" if config.method is Method.TRAINABLE_TOKENS else "trainable_token_indices"
        raise refuse(rows.name, f"the config's {key} does not name tokens for its module")
    if rows.shape != (len(ids), dim):
        raise refuse(rows.name, f"it has shape {list(rows.shape)}; {len(ids)} tokens need [{len(ids)}, {dim}]")
    return TokenRows(rows, tuple(ids))


def _ids_of(module: str, config: AdapterConfig, modules: ModuleTable) -> Sequence[int] | None:
    """The tokens whose rows of a module were trained; of a tied head without an entry, the embedding's."""
    for name, ids in config.token_ids.items():
        if name == ANY_MODULE or (module.endswith(name) if name else module == modules.embedding):
            return ids
    if module == modules.head and modules.is_tied:
        return _ids_of(modules.embedding, config, modules)
    return None


def _tie(
    whole: dict[str, OwnWeights],
    tokens: dict[str, TokenRows],
    groups: Mapping[str, Parts],
    config: AdapterConfig,
    modules: ModuleTable,
) -> None:
    """Let embedding and head have what replaces the one weight that they share.

    PEFT loads a file module by module, the head last: of a weight that the file has twice, the head's stays.
    """
    shared: TensorInfo | None = None
    tied = (modules.embedding, modules.head)
    for module in tied:
        if config.has_whole(module):
            replaced = groups.get(module, {}).get(Part.ORIGINAL_WEIGHT)
        else:
            replaced = whole[module].weight if module in whole else None
        if replaced is not None:
            if shared is not None and shared.shape != replaced.shape:
                raise refuse(
                    replaced.name,
                    f"it has shape {list(replaced.shape)}, and {shared.name!r}, the same weight on this base, has "
                    f"{list(shared.shape)}; {_SAVE_BOTH}",
                )
            shared = replaced
    if shared is not None:
        shapes = modules.by_path[modules.embedding].shapes
        _check_shapes(modules.embedding, OwnWeights(shared, None), shapes, is_vocabulary=True)
        for module in tied:
            if not config.has_whole(module):
                bias = whole[module].bias if module in whole else None
                whole[module] = OwnWeights(shared, bias, may_be_base=bias is None)
    trained = tokens.get(modules.embedding)
    if trained is not None and modules.head not in tokens:
        head = whole.get(modules.head)
        if head is not None and not head.may_be_base:
            raise refuse(trained.rows.name, "its rows belong to a tied head, which has weights of its own here")
        tokens[modules.head] = trained


def _check_complete(
    whole: Mapping[str, OwnWeights],
    tokens: Mapping[str, TokenRows],
    config: AdapterConfig,
    sites: SiteTable,
    modules: ModuleTable,
) -> None:
    known = (*sites.by_module, *modules.by_path)
    for name in config.modules_to_save:
        if not any(path.endswith(name) for module in known for path in _paths(module)):
            raise AdapterIncompatibleError(
                f"modules_to_save names {name[:256]!r}, and the base has no such module.", {"field": "modules_to_save"}
            )
    for module in known:
        is_norm = module in modules.by_path and modules.by_path[module].kind is ModuleKind.NORM
        if module not in whole and config.has_whole(module) and (is_norm or config.method is not Method.LN_TUNING):
            raise AdapterInvalidError(
                f"The config says that {module} has weights of its own, but the file has none; is the file complete?",
                {"module": module},
            )
    for name, ids in config.token_ids.items():
        if ids and not any(name == ANY_MODULE or module.endswith(name or modules.embedding) for module in tokens):
            shown = name or modules.embedding
            raise AdapterInvalidError(
                f"The config says that tokens of {shown[:256]} were trained, but the file has no rows; is it complete?",
                {"module": shown[:256]},
            )


def _paths(module: str) -> Iterator[str]:
    """The paths of a module and of everything that it is in."""
    parts = module.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _check_shapes(module: str, own: OwnWeights, shapes: Mapping[str, tuple[int, ...]], *, is_vocabulary: bool) -> None:
    if own.weight is not None:
        wanted = shapes["weight"]
        if is_vocabulary and len(own.weight.shape) == 2 and own.weight.shape[0]:
            wanted = (own.weight.shape[0], *wanted[1:])
        _check_shape(own.weight, wanted, module)
    if own.bias is not None:
        if "bias" not in shapes:
            raise refuse(own.bias.name, f"the base's {module} has no bias")
        rows = own.weight.shape[0] if is_vocabulary and own.weight is not None else shapes["bias"][0]
        _check_shape(own.bias, (rows,), module)


def _check_shape(info: TensorInfo, wanted: tuple[int, ...], module: str) -> None:
    if info.shape != wanted:
        raise refuse(info.name, f"it has shape {list(info.shape)}; the base's {module} needs {list(wanted)}")


def _vocab_size(whole: Mapping[str, OwnWeights], tokens: Mapping[str, TokenRows], modules: ModuleTable) -> int | None:
    """How many tokens embedding and head have rows for.

    Raises:
        AdapterIncompatibleError: not the same number; or rows of tokens that are nowhere else, with gaps.
    """
    sizes: list[tuple[int, str]] = []
    for module in (modules.embedding, modules.head):
        own, trained = whole.get(module), tokens.get(module)
        size, name = modules.vocab_size, ""
        if own is not None and own.weight is not None:
            size, name = own.weight.shape[0], own.weight.name
        if trained is not None:
            beyond = sorted(i for i in trained.ids if i >= size)
            if beyond and (name or beyond != list(range(size, beyond[-1] + 1))):
                raise refuse(
                    trained.rows.name, f"token {beyond[0]} is beyond the {size} rows that there are; {_SAVE_BOTH}"
                )
            size, name = size + len(beyond), name or trained.rows.name
        sizes.append((size, name))
    (embedded, in_embedding), (scored, in_head) = sizes
    if embedded != scored:
        raise refuse(
            in_embedding or in_head,
            f"the embedding has rows for {embedded} tokens and the head for {scored}; {_SAVE_BOTH}",
        )
    return None if embedded == modules.vocab_size else embedded
