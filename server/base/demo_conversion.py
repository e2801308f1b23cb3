"""The demo base's GGUF file as an ordinary model directory: dequantized by transformers, saved in bf16.

torch and transformers are imported only in here: that takes seconds, and a server with a warm cache never comes here.
"""

import errno
import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from ..errors import BaseModelError
from .demo_wheel import ProgressCallback

CONTEXT_TOKENS = 8192
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def require_packages() -> None:
    """Transformers needs both to read a GGUF file; better to learn it before a 93 MB download than after."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BaseModelError(
            f"Preparing the demo base needs the Python package(s) {', '.join(missing)}. Install them with "
            "`pip install 'lorikeet-server[demo]'`, or serve a model of your own with --model."
        )


def convert(gguf: Path, directory: Path, progress: ProgressCallback) -> None:
    """Dequantizes the GGUF file and saves model and tokenizer as an ordinary model directory.

    Raises:
        OSError: such as no space.
    """
    from safetensors import SafetensorError

    stage = "converting (half a minute)"
    progress(stage, 0, 3)
    try:
        with _quiet_transformers():
            _save_model(gguf, directory)
    except SafetensorError as error:
        # safetensors wraps the operating system's error and keeps its number only in the text.
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, "writing the weights") from error
    progress(stage, 1, 3)
    with _quiet_transformers():
        _save_tokenizer(gguf, directory)
    progress(stage, 2, 3)
    for path in directory.iterdir():
        # safetensors writes 0600, but a cache may be shared. Without fsync, a crash of the machine after the rename
        # could leave empty files under the final name.
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    progress(stage, 3, 3)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Mutes transformers' own bars and advice, which would tear this module's progress apart."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader's bar knows no switch.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _save_model(gguf: Path, directory: Path) -> None:
    """Weights in bf16, config and generation config."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would otherwise keep the GGUF blocks packed where the device has a matmul for them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, device_map="cpu", **options
    )
    # It is a plain bf16 model from here on; the traces of GGUF would make loaders look for packed weights.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config.architectures = [type(model).__name__]
    # GGUF keeps epsilon as float32: 9.999999747378752e-06 for what was written as 1e-05.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(directory)


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    """Tokenizer with the model's chat template and SmolLM2's pre-tokenizer."""
    import transformers
    from tokenizers import decoders, pre_tokenizers

    read = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # GGUF names the pre-tokenizer ("smollm": digits alone, then GPT-2's split) and transformers does not know that
    # name: it takes GPT-2's alone, which splits differently where blanks stand before a digit.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # transformers 5.17 adds SentencePiece's decoders, which would turn a "▁" in the text into a blank.
    backend.decoder = decoders.ByteLevel()
    # Wrapped anew with the special tokens by name: transformers 5.17 takes <|im_start|> for the end token.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=CONTEXT_TOKENS,
        **SPECIAL_TOKENS,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(directory)
