"""What a merged model needs beside its weights: config.json, generation_config.json and a tokenizer."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import PretrainedConfig

from ..adapters.merge.errors import MergeError
from ..adapters.merge.members import Member
from ..adapters.merge.merged import MergedModel
from ..adapters.merge.targets import Target
from ..adapters.merge.weights import dense_dtype
from ..adapters.tokenizer_files import TOKENIZER_FILE
from .base.loader import empty_model
from .merge_source import CheckpointWeights

_CONFIG: Final = "config.json"
_GENERATION: Final = "generation_config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"
# Of a base, what is copied: everything small that belongs to its tokenizer.
_TOKENIZER_FILES: Final = (
    TOKENIZER_FILE, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", _TEMPLATE, "tokenizer.model",
    "vocab.json", "merges.txt",
)  # fmt: skip
# Of those, what a tokenizer.json of an adapter's own takes the place of.
_OF_BACKEND: Final = frozenset(_TOKENIZER_FILES) - {TOKENIZER_FILE, _TOKENIZER_CONFIG, _TEMPLATE}
# Keys of a config that give linears a bias.
_BIAS_KEYS: Final = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")
# As transformers writes it for `load_in_4bit` with QLoRA's settings.
_NF4: Final[Mapping[str, Any]] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def bias_settings(base: CheckpointWeights, new_biases: frozenset[str]) -> tuple[dict[str, bool], frozenset[str]]:
    """The settings under which the architecture has biases where a merge needs them.

    Args:
        base: the model.
        new_biases: modules that have none in the base.

    Returns:
        Keys of config.json to set, and all modules that have a bias then and had none.

    Raises:
        MergeError: a module cannot have a bias in this architecture; names it.
    """
    if not new_biases:
        return {}, frozenset()
    known = base.config.to_dict()
    keys = [key for key in _BIAS_KEYS if known.get(key) is False]
    before = _biased(base.config, {})
    for count in range(1, len(keys) + 1):
        for chosen in itertools.combinations(keys, count):
            settings = dict.fromkeys(chosen, True)
            added = _biased(base.config, settings) - before
            if new_biases <= added:
                return settings, frozenset(added)
    module = min(new_biases)
    raise MergeError(
        f"The adapter gives {module} a bias, and a {base.architecture} can have none there, so the merged model could "
        "not be saved as one. Serve the adapter unmerged.",
        {"module": module},
    )


def _biased(config: PretrainedConfig, settings: dict[str, bool]) -> set[str]:
    """Linears of the architecture that have a bias under these settings."""
    changed = type(config).from_dict(config.to_dict() | settings)
    model = empty_model(changed, torch.bfloat16)
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module.bias is not None}


def write_config(
    directory: Path, base: CheckpointWeights, model: MergedModel, settings: Mapping[str, bool], to: Target
) -> None:
    """Write config.json: the base's own, with what the merge changes.

    Raises:
        OSError: the disk is full, or failed.
    """
    config: dict[str, Any] = json.loads((base.checkpoint.directory / _CONFIG).read_bytes())
    # The name that it was saved from is the base's, which the merged model is not.
    for key in ("quantization_config", "torch_dtype", "dtype", "_name_or_path"):
        config.pop(key, None)
    config |= settings
    config["dtype"] = str(dense_dtype(to)).removeprefix("torch.")
    config["vocab_size"] = model.vocab_size
    if base.modules.is_tied:
        config["tie_word_embeddings"] = model.is_tied
    if to is Target.NF4:
        config["quantization_config"] = dict(_NF4)
    _write_json(directory / _CONFIG, config)


def write_generation_config(directory: Path, base: CheckpointWeights, members: Iterable[Member]) -> None:
    """Write generation_config.json: the base's, with the tokens at which an adapter's own tokenizer ends an answer.

    Raises:
        OSError: the disk is full, or failed.
    """
    path = base.checkpoint.directory / _GENERATION
    config: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    given = config.get("eos_token_id", base.config.eos_token_id)
    ids = [i for i in (given if isinstance(given, list) else [given]) if i is not None]
    own = {i for member in members if member.tokenizer is not None for i in member.tokenizer.eos_token_ids}
    ids += sorted(own - set(ids))
    if config or ids:
        _write_json(
            directory / _GENERATION, config | ({"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {})
        )


def write_tokenizer(directory: Path, base: CheckpointWeights, members: Iterable[Member]) -> None:
    """Write the tokenizer: the base's, under the files of an adapter whose own is another.

    Raises:
        OSError: the disk is full, or failed.
    """
    source = base.checkpoint.directory
    files = {name: (source / name).read_bytes() for name in _TOKENIZER_FILES if (source / name).is_file()}
    own = next((member for member in members if member.tokenizer is not None), None)
    if own is not None:
        given = own.loaded.tokenizer_files.files
        if TOKENIZER_FILE in given:
            files = {name: data for name, data in files.items() if name not in _OF_BACKEND}
        if _has_template(given):
            files.pop(_TEMPLATE, None)
        files |= given
    for name, data in files.items():
        (directory / name).write_bytes(data)


def _has_template(files: Mapping[str, bytes]) -> bool:
    """Whether an adapter's files say what the chat template is, in either place; they were parsed when it was read."""
    if _TEMPLATE in files:
        return True
    return _TOKENIZER_CONFIG in files and "chat_template" in json.loads(files[_TOKENIZER_CONFIG])


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
