"""PEFT makes adapters of every format on an NF4 base, and says what they answer, alone and combined.

Every answer is of the folder that was saved, loaded by `PeftModel.from_pretrained` into a copy of the base.
"""

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..devices import CPU
from .formats import WEIGHTS, Format
from .peft_oracle import nf4_model

Members = tuple[tuple[str, float], ...]

# By how much an untrained parameter is moved (std): so that each part matters and no activation explodes.
_NOISE = {"lora_E": 1.0, "lora_embedding": 0.3, "lora_": 0.2, "embed_tokens": 0.1, "lm_head": 0.05, "norm": 0.2}
_NOISE_ELSEWHERE = 0.2


class FormatOracle:
    """Adapters of one base.

    Args:
        directory: the 16-bit base.
        out: the adapters that are served are saved to out/<name>.
        pristine: the same as PEFT wrote them.
        noise: by how much untrained parameters are moved, of what suits a small random base.
        device: where PEFT answers; adapters are made on the CPU, so that they are the same everywhere.
    """

    def __init__(
        self, directory: Path, out: Path, pristine: Path, noise: float = 1.0, device: torch.device = CPU
    ) -> None:
        self.out, self.pristine = out, pristine
        self._noise = noise
        self._device = device
        self._making = nf4_model(directory)
        self._base = self._making if device == CPU else nf4_model(directory, device)
        self._formats: dict[str, Format] = {}
        self._loaded: dict[str, PeftModel] = {}
        self._combined: PeftModel | None = None

    def make(self, wanted: Format, seed: int = 0) -> PeftModel:
        """Save one adapter; returns the model that it was made on."""
        directory = self.pristine / wanted.name
        torch.manual_seed(seed)
        base = self._copy(wanted, of=self._making)
        model = get_peft_model(base, copy.deepcopy(wanted.config))  # type: ignore[arg-type]
        settings: dict[str, Any] = dict(wanted.save)
        if wanted.config.init_lora_weights == "eva":
            self._init_eva(model)
        if wanted.config.init_lora_weights == "pissa":
            # As PEFT's documentation has it: the start is saved, and what was learnt since is what is served.
            settings["path_initial_model_for_weight_conversion"] = str(self.pristine / f"{wanted.name}-start")
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(settings["path_initial_model_for_weight_conversion"])
        train(model, self._noise, rows_from=self.vocab_size)
        model.save_pretrained(directory, **settings)
        if wanted.dtype is not torch.float32:
            tensors = {name: tensor.to(wanted.dtype) for name, tensor in load_file(directory / WEIGHTS).items()}
            save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        shutil.copytree(directory, self.out / wanted.name)
        if wanted.respell is not None:
            wanted.respell(self.out / wanted.name)
        self._formats[wanted.name] = wanted
        return model.eval()

    @property
    def vocab_size(self) -> int:
        """Of the base."""
        return int(self._base.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def known_ids(self, members: Members) -> int:
        """Token ids below this are known to every member."""
        return self.vocab_size + max((self._formats[name].added_tokens for name, _ in members), default=0)

    @torch.inference_mode()
    def logits(self, members: Members, ids: Sequence[int]) -> Tensor:
        """float32 logits of every position, [len(ids), vocab], of no adapter, one or a weighted sum of several.

        The strength of one is PEFT's scaling multiplied; a sum is its `cat`. They are on the CPU.
        """
        if not members:
            return self._answer(self._base, ids)
        if len(members) == 1:
            (name, strength), *_ = members
            with _scaled(self._load(name), strength) as model:
                return self._answer(model, ids)
        return self._answer(self._combine(members), ids)

    def logits_of(self, made: Format, directory: Path, ids: Sequence[int]) -> Tensor:
        """What PEFT answers with a folder of that format."""
        model = PeftModel.from_pretrained(self._copy(made), str(directory)).eval()  # type: ignore[arg-type]
        with torch.inference_mode():
            return self._answer(model, ids)

    def _answer(self, model: nn.Module, ids: Sequence[int]) -> Tensor:
        inputs = torch.tensor([list(ids)], device=self._device)
        return model(input_ids=inputs, use_cache=False).logits[0].cpu()  # type: ignore[no-any-return]

    def _load(self, name: str) -> PeftModel:
        if name not in self._loaded:
            base = self._copy(self._formats[name])
            self._loaded[name] = PeftModel.from_pretrained(base, str(self.pristine / name)).eval()  # type: ignore[arg-type]
        return self._loaded[name]

    def _combine(self, members: Members) -> PeftModel:
        """A model whose active adapters are these: PEFT's `cat` of them, or, at weights of 1, all of them at once."""
        if all(self._formats[name].is_low_rank for name, _ in members):
            return self._cat(members)
        assert all(weight == 1.0 for _, weight in members), "PEFT weights low-rank deltas only"
        base = self._copy(*(self._formats[name] for name, _ in members))
        # PEFT cannot load an adapter without token rows after one with them.
        names = sorted((name for name, _ in members), key=lambda name: self._formats[name].has_token_rows)
        model = PeftModel.from_pretrained(base, str(self.pristine / names[0]), adapter_name=names[0])  # type: ignore[arg-type]
        for name in names[1:]:
            model.load_adapter(str(self.pristine / name), name)
        model.base_model.set_adapter(names)
        return model.eval()  # type: ignore[no-any-return]

    def _cat(self, members: Members) -> PeftModel:
        name = "cat-" + "-".join(f"{name}@{weight:g}" for name, weight in members).replace(".", "_")
        # The combined adapter takes over the first one's config beside rank and alpha: none that has more to say.
        ordered = sorted(members, key=lambda member: not self._is_simple(member[0]))
        assert self._is_simple(ordered[0][0])
        if self._combined is None:
            self._combined = PeftModel.from_pretrained(
                self._copy(), str(self.pristine / ordered[0][0]), adapter_name=ordered[0][0]
            )  # type: ignore[arg-type]
        for adapter, _ in ordered:
            if adapter not in self._combined.peft_config:
                self._combined.load_adapter(str(self.pristine / adapter), adapter)
        self._combined.add_weighted_adapter(
            [adapter for adapter, _ in ordered], [weight for _, weight in ordered], name, combination_type="cat"
        )
        self._combined.set_adapter(name)
        return self._combined.eval()  # type: ignore[no-any-return]

    def _is_simple(self, name: str) -> bool:
        config = self._formats[name].config
        return not (config.use_rslora or config.layers_to_transform or config.exclude_modules) and (
            config.init_lora_weights is False
        )

    def _copy(self, *made: Format, of: nn.Module | None = None) -> nn.Module:
        """The base as these formats need it."""
        base = copy.deepcopy(self._base if of is None else of)
        thawed = tuple(name for each in made for name in each.thawed)
        for path, module in list(base.named_modules()):
            if isinstance(module, Linear4bit) and path.endswith(thawed or ("?",)):
                base.set_submodule(path, _dequantized(module))
        added = max((each.added_tokens for each in made), default=0)
        if added:
            base.resize_token_embeddings(self.vocab_size + added, mean_resizing=False)  # type: ignore[operator]
        return base

    def _init_eva(self, model: PeftModel) -> None:
        ids = torch.randint(3, self.vocab_size, (6, 4, 24))
        batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)


@contextmanager
def _scaled(model: PeftModel, strength: float) -> Iterator[PeftModel]:
    """The model with its one adapter's scaling multiplied."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scale_layer(strength)
    try:
        yield model
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


def train(model: PeftModel, scale: float, rows_from: int) -> None:
    """Move every parameter that training moves, and the rows of added tokens."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or ".original_module." in name:
            continue
        std = next((std for part, std in _NOISE.items() if part in name), _NOISE_ELSEWHERE)
        noise = torch.randn_like(parameter) * scale
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.25 * noise)
        elif "lora_embedding" in name:
            # PEFT's own start is as large as an embedding, or zero.
            parameter.data.copy_(noise * std)
        elif parameter.requires_grad or "lora_" in name:
            parameter.data.add_(noise * std)
        elif parameter.ndim == 2 and parameter.shape[0] > rows_from:
            parameter.data[rows_from:].add_(noise[rows_from:] * std)


def _dequantized(linear: Linear4bit) -> nn.Linear:
    """The same linear in fp32."""
    weight = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(torch.float32)
    thawed = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    thawed.weight = nn.Parameter(weight.view(linear.out_features, linear.in_features))
    if linear.bias is not None:
        thawed.bias = nn.Parameter(linear.bias.data.float())
    return thawed


def random_prompts(count: int, lengths: tuple[int, int], vocab_size: int, seed: int) -> list[list[int]]:
    """Of lengths[0] to lengths[1] - 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in sizes]
