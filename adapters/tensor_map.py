"""Which tensor of an adapter file belongs to which slice of which site. Imports no torch.

Every tensor is either given a place or the adapter is refused, naming the tensor and the reason; so is a module that
the config targets and the file lacks. Works on the header alone: a wrong file is refused before its payload is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .config import AdapterConfig, Method
from .errors import AdapterIncompatibleError, AdapterInvalidError, ServingError
from .fingerprint import BaseFingerprint
from .scaling import Scaling, resolve_scaling
from .sites import SiteTable
from .weights_file import TensorInfo

# `base_model.model.` is PEFT's wrapper; the adapter's own name appears in files that were not saved through PEFT's
# save_pretrained; AdaLoRA's parameters have no `.weight`.
_KEY: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>lora_[ABE])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)

# Parts of tensor names that are known and not served, in the order in which they are looked for.
_UNSERVED: Final = (
    ("lora_magnitude_vector", "it is a DoRA magnitude; DoRA is not served"),
    ("lora_embedding_", "it adapts an embedding; embeddings are shared and only linears are adapted"),
    ("modules_to_save", "it is a whole module (modules_to_save); whole modules cannot differ per request"),
    ("trainable_tokens", "it replaces token embeddings; embeddings are shared"),
    ("prompt_embeddings", "it is a soft prompt; only LoRA and AdaLoRA are served"),
    (".bias", "it is a bias; biases are part of the shared base"),
    ("embed_tokens", "it is an embedding (was the vocabulary extended?); embeddings are shared"),
    ("lm_head", "it is the output head (was the vocabulary extended?); the head is shared"),
)


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one adapted module.

    Attributes:
        module: path in the base, e.g. `model.layers.0.self_attn.q_proj`.
        scaling: rank and factor that the config gives it.
        lora_a: [rank, in_features].
        lora_b: [out_features, rank].
        lora_e: [rank, 1] for AdaLoRA, else None.
    """

    module: str
    scaling: Scaling
    lora_a: TensorInfo
    lora_b: TensorInfo
    lora_e: TensorInfo | None


def group_tensors(tensors: Mapping[str, TensorInfo], config: AdapterConfig) -> list[ModuleTensors]:
    """Group the tensors by module and check them against the config, without looking at a base.

    Raises:
        AdapterIncompatibleError: a kind of tensor that is not served.
        AdapterInvalidError: incomplete groups, shapes that contradict the config, or no adapted module at all.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise _refuse(name, _why_unserved(name))
        group = parts.setdefault(key["module"], {})
        if key["part"] in group:
            raise AdapterInvalidError(
                f"Tensors {group[key['part']].name!r} and {name!r} are both {key['part']} of the same module.",
                _about(name),
            )
        group[key["part"]] = info
    if not parts:
        raise AdapterInvalidError("The file has no lora_A and lora_B tensors: no module would be adapted.")
    return [_complete(module, group, config) for module, group in parts.items()]


def match_sites(
    groups: Iterable[ModuleTensors], config: AdapterConfig, sites: SiteTable, base: BaseFingerprint
) -> dict[str, ModuleTensors]:
    """Check that every group fits a slice of the base and that no targeted slice lacks one.

    Returns:
        Module path -> its tensors; every key is in `sites.by_module`.

    Raises:
        AdapterIncompatibleError: an unknown module, another shape, or a module the config does not target.
        AdapterInvalidError: the config targets a module of the base that the file lacks.
    """
    placed: dict[str, ModuleTensors] = {}
    for group in groups:
        if group.module not in sites.by_module:
            raise _refuse(group.lora_a.name, _why_unknown(group.module) + "." + base.explain(config.trained_for))
        if not config.targets(group.module):
            raise _refuse(group.lora_a.name, "the config's target_modules does not name its module; PEFT would drop it")
        site, index = sites.by_module[group.module]
        out_features = site.slices[index].out_features
        for info, got, width in (
            (group.lora_a, group.lora_a.shape[1], site.in_features),
            (group.lora_b, group.lora_b.shape[0], out_features),
        ):
            if got != width:
                fits = f"the base's {group.module} maps {site.in_features} to {out_features} features"
                why = f"it has shape {list(info.shape)}, but {fits}."
                raise _refuse(info.name, why + base.explain(config.trained_for))
        placed[group.module] = group
    if config.targets.explicit:
        for module in sites.by_module:
            if module not in placed and config.targets(module):
                raise AdapterInvalidError(
                    f"The config targets {module}, but the file has no tensors for it; is the file complete?",
                    {"module": module},
                )
    return placed


def count_elements(scalings: Mapping[str, Scaling], sites: SiteTable) -> int:
    """How many arena elements an adapter of these modules takes."""
    total = 0
    for module, scaling in scalings.items():
        site, index = sites.by_module[module]
        total += scaling.rank * (site.in_features + site.slices[index].out_features)
    return total


def _complete(module: str, group: Mapping[str, TensorInfo], config: AdapterConfig) -> ModuleTensors:
    wanted = ["lora_A", "lora_B"] + (["lora_E"] if config.method is Method.ADALORA else [])
    some = next(iter(group.values()))
    for part in wanted:
        if part not in group:
            raise AdapterInvalidError(f"Tensor {some.name!r} has no {part} beside it.", _about(some.name))
    if "lora_E" in group and config.method is not Method.ADALORA:
        raise _refuse(group["lora_E"].name, f"it belongs to AdaLoRA, but peft_type is {config.method}")
    scaling = resolve_scaling(config, module)
    lora_a, lora_b, lora_e = group["lora_A"], group["lora_B"], group.get("lora_E")
    for info, dim in ((lora_a, 0), (lora_b, 1)):
        if len(info.shape) != 2:
            raise AdapterInvalidError(
                f"Tensor {info.name!r} has shape {list(info.shape)}; it must be a matrix.", _about(info.name)
            )
        if info.shape[dim] != scaling.rank:
            raise AdapterInvalidError(
                f"Tensor {info.name!r} has rank {info.shape[dim]} (shape {list(info.shape)}), but the config gives "
                f"{module} rank {scaling.rank}.",
                _about(info.name),
            )
    if lora_e is not None and lora_e.shape != (scaling.rank, 1):
        raise AdapterInvalidError(
            f"Tensor {lora_e.name!r} has shape {list(lora_e.shape)}; it must be [{scaling.rank}, 1].",
            _about(lora_e.name),
        )
    return ModuleTensors(module, scaling, lora_a, lora_b, lora_e)


def _why_unserved(name: str) -> str:
    return next((why for part, why in _UNSERVED if part in name), "it is neither a lora_A nor a lora_B")


def _why_unknown(module: str) -> str:
    for part, why in _UNSERVED:
        if module.rpartition(".")[2] == part:
            return why
    return f"the base has no linear {module[:256]!r}"


def _refuse(name: str, why: str) -> ServingError:
    return AdapterIncompatibleError(f"Tensor {name[:256]!r} cannot be applied: {why.removesuffix('.')}.", _about(name))


def _about(name: str) -> dict[str, str]:
    return {"tensor": name[:256]}
