"""The engine in this process, and a merged model beside it, against what transformers and PEFT compute."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lorikeet.server.config import ServerConfig
from lorikeet.server.evaluation.comparison import compare_models
from lorikeet.server.evaluation.errors import EvaluationError, TextTooShortError
from lorikeet.server.evaluation.local_engine import LocalEngine, local_engine
from lorikeet.server.evaluation.scoring_run import perplexities
from lorikeet.server.evaluation.transformers_model import TransformersModel, disk_bytes, tensor_bytes
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..devices import CPU
from ..golden.peft_oracle import nf4_model
from ..tiny import MAX_CONTEXT, TEXT, save_tiny_adapter, save_tiny_model

# (dtype fp32, tolerance): the same fp32 weights on both sides; matmuls are grouped differently.
TOLERANCE = 2e-4
CONTEXT, STRIDE = 48, 16


@dataclass(frozen=True)
class World:
    """A base, an adapter, the two merged by PEFT, and what is on them."""

    config: ServerConfig
    adapter: Path
    merged: Path
    texts: Sequence[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("comparison")
    save_tiny_model(root / "model")
    save_tiny_adapter(root / "model", root / "adapters" / "ours", seed=1, rank=4, alpha=1)
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    PeftModel.from_pretrained(base, str(root / "adapters" / "ours")).merge_and_unload().save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "merged")
    config = ServerConfig(
        model=str(root / "model"), cache_dir=root / "cache", threads=1, compute_dtype="float32", device="cpu",
        kv_cache_bytes="4MiB", adapter_device_bytes="8MiB",
    )  # fmt: skip
    return World(config, root / "adapters" / "ours", root / "merged", [" ".join(TEXT), TEXT[2] * 5])


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[LocalEngine]:
    with local_engine(world.config, [world.adapter]) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapted(world: World) -> nn.Module:
    """PEFT on transformers' NF4 base."""
    return PeftModel.from_pretrained(nf4_model(Path(world.config.model)), str(world.adapter)).eval()  # type: ignore[arg-type]


@torch.inference_mode()
def logprobs(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Of every next token in windows of their own context: float32 [len - 1, vocab]."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].float().log_softmax(-1)


def test_perplexities_are_pefts(world: World, engine: LocalEngine, adapted: nn.Module) -> None:
    members = {"base": (), "ours": ((world.adapter, 1.0),)}
    run = perplexities(engine, members, world.texts, context=256)
    losses = []
    for text in world.texts:
        tokens = engine.encode(text)
        assert len(tokens) < 256
        losses.append(-logprobs(adapted, tokens).gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)))
    wanted = torch.cat(losses)
    assert run.results["ours"].tokens == len(wanted)
    assert run.results["ours"].loss == pytest.approx(wanted.mean().item(), abs=TOLERANCE)
    assert run.results["base"].loss != pytest.approx(wanted.mean().item(), abs=0.05)


def test_windows_hide_what_is_before_them(world: World, engine: LocalEngine, adapted: nn.Module) -> None:
    run = perplexities(engine, {"ours": ((world.adapter, 1.0),)}, world.texts[:1], context=CONTEXT, stride=STRIDE)
    tokens = engine.encode(world.texts[0])
    found: list[Tensor] = []
    start, first = 0, 1
    while first < len(tokens):
        stop = min(len(tokens), start + CONTEXT)
        rows = logprobs(adapted, tokens[start:stop])[first - start - 1 :]
        found.append(-rows.gather(-1, torch.tensor(tokens[first:stop]).unsqueeze(-1)))
        start, first = min(start + STRIDE, len(tokens) - CONTEXT), stop
    assert run.results["ours"].tokens == len(tokens) - 1
    assert run.results["ours"].loss == pytest.approx(torch.cat(found).mean().item(), abs=TOLERANCE)


def test_the_report_compares_all_three(world: World, engine: LocalEngine, adapted: nn.Module) -> None:
    members = ((world.adapter, 1.0),)
    report = compare_models(world.config, members, world.merged, world.texts, context=256)
    merged = AutoModelForCausalLM.from_pretrained(world.merged, dtype=torch.float32).eval()
    divergences, losses = [], []
    for text in world.texts:
        tokens = engine.encode(text)
        p, q = logprobs(adapted, tokens), logprobs(merged, tokens)
        divergences.append((p.exp() * (p - q)).sum(-1))
        losses.append(-q.gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)))
    wanted = torch.cat(divergences)
    apart = report.merged.divergence
    assert apart is not None and apart.tokens == len(wanted)
    assert (apart.mean, apart.largest) == pytest.approx((wanted.mean().item(), wanted.max().item()), abs=1e-3)
    assert report.merged.perplexity.loss == pytest.approx(torch.cat(losses).mean().item(), abs=TOLERANCE)
    run = perplexities(engine, {"base": (), "ours": members}, world.texts, context=256)
    assert report.base.perplexity.loss == pytest.approx(run.results["base"].loss, abs=TOLERANCE)
    assert report.unmerged.perplexity.loss == pytest.approx(run.results["ours"].loss, abs=TOLERANCE)
    assert report.merged.resident_bytes == tensor_bytes(world.merged) < disk_bytes(world.merged)
    assert report.base.resident_bytes < report.unmerged.resident_bytes < report.merged.resident_bytes
    assert all(way.step_s and way.step_s > 0 for way in (report.base, report.unmerged, report.merged))
    assert (report.device, report.compute_dtype, report.context, report.stride) == ("cpu", "float32", 256, 128)


def test_bad_input(world: World, engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(TextTooShortError, match="at least 128 are needed"):
        compare_models(world.config, (), world.merged, ["Too short."])
    with pytest.raises(EvaluationError, match="no tokenizer"):
        compare_models(world.config, (), tmp_path, world.texts)
    with pytest.raises(EvaluationError, match="no directory"), local_engine(world.config, [tmp_path / "gone"]):
        pass
    with pytest.raises(EvaluationError, match="no safetensors"):
        tensor_bytes(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(EvaluationError, match="damaged"):
        TransformersModel(tmp_path, device=CPU, compute_dtype=torch.float32)
    with pytest.raises(EvaluationError, match=f"at most {MAX_CONTEXT}"):
        perplexities(engine, {"base": ()}, world.texts, context=MAX_CONTEXT + 1)


def test_tokens_that_nobody_here_knows_are_refused_and_the_engine_goes_on(world: World, engine: LocalEngine) -> None:
    members = ((world.adapter, 1.0),)
    for tokens in ([5, 6, engine.vocab_size], [5, engine.vocab_size, 6]):
        for who in ((), members):
            with pytest.raises(EvaluationError, match=f"below {engine.vocab_size}"):
                engine.score(tokens, 1, who)
    assert len(engine.score([5, 6, engine.vocab_size - 1], 1, members)) == 2


def test_a_merged_model_that_cannot_be_compared(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.merged, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(world.merged)
    tokenizer.add_tokens(["nectar"])
    tokenizer.save_pretrained(tmp_path / "merged")
    members = ((world.adapter, 1.0),)
    with pytest.raises(EvaluationError, match="only the adapter knows"):
        compare_models(world.config, members, tmp_path / "merged", world.texts)
    with pytest.raises(EvaluationError, match="changed while it was merged"):
        compare_models(world.config, members, world.merged, world.texts, digests=[(world.adapter, "ab" * 32)])


def test_the_base_is_counted_in_16_bit_whatever_it_is_held_in(engine: LocalEngine) -> None:
    base = engine._app.base
    dense = {p.data_ptr(): p for p in base.model.parameters()}.values()
    assert {p.dtype for p in dense} == {torch.float32, torch.bfloat16}  # the vocabulary is not held in the compute type
    assert engine.base_bytes == base.nf4_bytes + 2 * sum(p.numel() for p in dense)
