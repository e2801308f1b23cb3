"""Loads a base model in NF4: transformers' own module tree on the meta device, filled tensor by tensor.

Linears inside decoder layers become NF4; embeddings, norms and lm_head keep 16 bit (the compute dtype), as QLoRA leaves
them. q/k/v and gate/up are stacked. Runs once, at start, on the main thread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from ...adapters.fingerprint import BaseFingerprint
from ...adapters.modules import ModuleTable
from ...adapters.sites import SiteTable
from ..errors import BaseModelError
from .attention import ATTENTION
from .base_hash import identify_base
from .checkpoint import BaseCheckpoint, quantization_of, resolve_source
from .families import check_servable, context_limit
from .fill import fill_model
from .footprint import explained_out_of_memory, resident_bytes
from .model import BaseModel
from .module_table import describe_modules
from .nf4_cache import NF4Cache
from .site_plan import SitePlan, describe_sites, install_sites, plan_sites
from .vocabulary import keep_vocabulary_narrow
from .weights import ResidentWeights

# Of `torch.nn.init` and `Tensor`; any other works on the meta device too, only slowly.
_DRAWS: Final = frozenset(("kaiming_uniform_", "normal_", "uniform_"))


def load_base(
    source: str,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    cache_dir: Path | None = None,
    name: str = "",
    progress: bool = True,
) -> BaseModel:
    """Load and, unless it already is, quantize a base model.

    Args:
        source: directory or hub id; 16-bit safetensors, or a bitsandbytes NF4 checkpoint (taken as it is).
        device: where the weights live.
        compute_dtype: bfloat16 or float32 (exact tests; CPUs without AVX512-BF16).
        cache_dir: where the quantized form of a 16-bit model is kept, so that the next start reads 4-bit weights; None
            keeps nothing.
        name: the model's public name, where it is not `source`; adapters say by it what they were trained on.
        progress: show a bar on stderr.

    Raises:
        BaseModelError: anything that keeps this model from being served, by name.
    """
    directory = resolve_source(source)
    checkpoint = BaseCheckpoint(directory)
    config = read_config(directory)
    check_servable(config)
    quantized = quantization_of(config) is not None
    cache = NF4Cache(cache_dir, checkpoint, compute_dtype) if cache_dir and not quantized else None

    def fill(model: nn.Module, plans: list[SitePlan]) -> None:
        if cache is None or not cache.read(model, plans, device):
            fill_model(model, plans, checkpoint, device, compute_dtype, quantized, progress)
            if cache is not None:
                cache.write(model, plans)

    return build_base(
        config,
        fill,
        tokenizer=read_tokenizer(directory),
        eos_token_ids=read_eos_token_ids(directory, config),
        fingerprint=identify_base(source, name, directory, checkpoint),
        device=device,
        compute_dtype=compute_dtype,
    )


def build_base(
    config: PretrainedConfig,
    fill: Callable[[nn.Module, list[SitePlan]], None],
    *,
    tokenizer: Any,
    eos_token_ids: frozenset[int],
    fingerprint: BaseFingerprint,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> BaseModel:
    """Build the module tree, have it filled, and put the NF4 linears in.

    Args:
        config: of the model.
        fill: gives every plan its codes and every other parameter its tensor, on `device`.
        tokenizer, eos_token_ids, fingerprint, device, compute_dtype: see `BaseModel`.

    Raises:
        BaseModelError: this architecture cannot be served, or its weights do not fit into the device's memory.
    """
    architecture = check_servable(config)
    model = empty_model(config, compute_dtype)
    plans = plan_sites(model)
    module_table = describe_modules(model)
    with explained_out_of_memory(resident_bytes(model, plans, compute_dtype), device):
        fill(model, plans)
    model.tie_weights()  # type: ignore[operator]
    _move_buffers(model, device)
    keep_vocabulary_narrow(model, device, compute_dtype)
    site_table = SiteTable(install_sites(model, plans, compute_dtype))
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        architecture=architecture,
        site_table=site_table,
        module_table=module_table,
        weights=ResidentWeights(model, site_table, module_table, compute_dtype),
        device=device,
        compute_dtype=compute_dtype,
        max_context=context_limit(config),
        eos_token_ids=eos_token_ids,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, slots=True)
class BaseOutline:
    """What adapters are checked against.

    Attributes:
        site_table: every adaptable linear.
        module_table: what it has beside them.
        fingerprint: names and hash; without weights, the hash is unknown.
        vocab_size: token ids are below it.
    """

    site_table: SiteTable
    module_table: ModuleTable
    fingerprint: BaseFingerprint
    vocab_size: int


def outline_base(source: str, directory: Path, *, name: str = "") -> BaseOutline:
    """Describe a base without loading it: needs its config.json only, and little time and memory.

    Args:
        source: directory or hub id that was asked for.
        directory: where its files are.
        name: its public name, where it is not `source`.

    Raises:
        BaseModelError: this model could not be served, or its weights are damaged.
    """
    config = read_config(directory)
    check_servable(config)
    quantization_of(config)
    model = empty_model(config, torch.bfloat16)
    site_table = SiteTable(describe_sites(model, plan_sites(model)))
    checkpoint = BaseCheckpoint(directory) if any(directory.glob("*.safetensors")) else None
    fingerprint = identify_base(source, name, directory, checkpoint)
    return BaseOutline(site_table, describe_modules(model), fingerprint, int(config.vocab_size))


def read_config(directory: Path) -> PretrainedConfig:
    """The config of a model directory.

    Raises:
        BaseModelError: it is missing, damaged, or of an architecture that transformers does not know.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
        return config
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"transformers does not know the model in {directory}: its config.json names no architecture "
            "of the installed version, or is damaged. Lorikeet runs no code that ships with a model."
        ) from error


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, a fast one.

    Raises:
        BaseModelError: there is none that transformers can load, or it is a slow one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise BaseModelError(f"The model directory {directory} has no tokenizer that transformers can load.") from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"The tokenizer in {directory} is not a fast one (tokenizer.json); streaming needs it.")
    return tokenizer


def read_eos_token_ids(directory: Path, config: PretrainedConfig) -> frozenset[int]:
    """The tokens at which a model ends an answer."""
    eos = config.eos_token_id
    if (directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id or eos
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(int(i) for i in ids if i is not None)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The module tree with its matrices on the meta device; norms and computed buffers are real, on the CPU."""
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with _NoMemory():
        model: nn.Module = AutoModelForCausalLM.from_config(plain, dtype=dtype, attn_implementation=ATTENTION)
    return model.eval().requires_grad_(False)


class _NoMemory(TorchFunctionMode):
    """Tensors that are made to be filled later are on the meta device, and no numbers are drawn for them.

    Not `torch.device("meta")`: rotary frequencies would be computed there, and torch computes and draws on that device
    by Python code that loads sympy first (torch 2.13).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            return func(*args, **kwargs | {"device": "meta"})
        if func.__name__ in _DRAWS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
