"""The reference of golden files: what transformers, bitsandbytes and PEFT answer, in float32 on the CPU.

Nothing of Lorikeet's engine, kernels, loader or scaling takes part, so what agrees with it is right. The base is held
in NF4 with double quantization, as QLoRA trains and Lorikeet serves; a checkpoint that is already quantized is taken as
it is.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from .. import __version__
from .errors import BaseModelError

_PACKAGES = ("peft", "accelerate")


class Reference(NamedTuple):
    """What the reference answers.

    Attributes:
        adapted: float32 [P, V], logits of each prompt's last position with the adapter.
        plain: the same without it.
    """

    adapted: Tensor
    plain: Tensor


def require_packages() -> None:
    """Fail early if something is not installed.

    Raises:
        BaseModelError: names the packages and the extra that brings them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BaseModelError(
            f"A golden file is computed with PEFT, and the Python package(s) {', '.join(missing)} are not installed. "
            "Install them with `pip install 'lorikeet-server[train]'`."
        )


def made_by() -> str:
    """The software of the reference, for the file."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes", "torch"))
    return f"lorikeet {__version__} with {packages}, float32 on a CPU"


def encode(base: Path, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of prompts, with the special tokens that the tokenizer adds by default."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return [tokenizer.encode(text) for text in texts]


@torch.inference_mode()
def reference_logits(
    base: Path, adapter: Path, prompts: Sequence[Sequence[int]], *, vocab_size: int | None = None, progress: bool
) -> Reference:
    """Compute the reference; takes the time that quantizing the base takes, and some seconds.

    Args:
        base: directory of the base.
        adapter: directory of the adapter, checked before.
        prompts: token ids.
        vocab_size: the adapter's, where it is not the base's: PEFT loads it into a base of as many rows only.
        progress: show bars on standard error.
    """
    from peft import PeftModel  # an extra

    with _quiet(progress):
        plain_model = _nf4_model(base)
        if vocab_size is not None:
            plain_model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model = PeftModel.from_pretrained(plain_model, str(adapter)).eval()
    adapted, plain = [], []
    for prompt in tqdm(prompts, desc="Computing golden logits", unit="prompt", disable=not progress):
        ids = torch.tensor([prompt])
        adapted.append(_last(model, ids))
        with model.disable_adapter():
            plain.append(_last(model, ids))
    return Reference(torch.stack(adapted), torch.stack(plain))


def _last(model: Any, ids: Tensor) -> Tensor:
    row: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return row


def _nf4_model(directory: Path) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized = hasattr(AutoConfig.from_pretrained(directory, local_files_only=True), "quantization_config")
    # Even None would replace the quantization that a checkpoint brings along.
    extra: dict[str, Any] = {} if quantized else {"quantization_config": settings}
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        device_map="cpu",
        local_files_only=True,
        use_safetensors=True,
        **extra,
    )
    compute_in_float32(model)
    return model


def compute_in_float32(model: Any) -> None:
    """Have a transformers model that is plain or in NF4, and was loaded in float32, compute in it throughout."""
    from bitsandbytes.nn import Linear4bit

    for parameter in model.parameters():
        # Of a checkpoint that was quantized before, transformers leaves the rest in bf16 whatever was asked for.
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            # A checkpoint that was quantized before says bf16, to which each dequantized value would be rounded.
            weight: Any = module.weight
            weight.quant_state.dtype = torch.float32
            # Where the CPU has AVX512-BF16, bitsandbytes would compute in bf16 although fp32 was asked for.
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without warnings: what PEFT says about AdaLoRA lists hundreds of modules, and is not so."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
