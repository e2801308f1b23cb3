"""The lean decoder computes what transformers' forward does, with LoRA attached, and takes no model it doesn't know."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.adapters.sites import Site, SiteTable
from lorikeet.kernels import overlap
from lorikeet.server.base.attention import PagedStep
from lorikeet.server.base.lean_modules import read_lean_modules
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.base.site_plan import describe_sites, plan_sites
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen2Config

from ..adapters.hand_made import HandMade
from ..devices import CPU, GPU, needs_cuda
from .family_models import COMMON, VOCAB, family_config, save_model
from .paged_driver import PagedDriver

LENGTHS = (23, 1, 40, 9, 31)
SLOTS = (-1, -1, 0, 0, 1)  # of each sequence
# (dtype fp32, tolerance): the same weights; means of squares, rotations and sums are grouped differently.
TOLERANCE = 2e-5

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, PretrainedConfig] = {
    "llama": family_config("llama"),  # tied head, llama3 frequencies
    "mistral": family_config("mistral"),  # sliding window
    "qwen2": family_config("qwen2"),  # biases of q, k and v; a window in some layers
    "qwen3": family_config("qwen3"),  # norms of heads
    "llama-biases": LlamaConfig(**COMMON, head_dim=48, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "llama-odd-heads": LlamaConfig(**COMMON | {"num_attention_heads": 16}, head_dim=20),  # no multiple of 8
    "qwen2-yarn": Qwen2Config(**COMMON, rope_parameters=YARN),  # cos and sin are scaled
}


class Adapted(NamedTuple):
    """A base in fp32 with two adapters on all of its linears."""

    base: BaseModel
    batch: LoraBatch


def load(name: str, directory: Path, dtype: torch.dtype, device: torch.device = CPU) -> BaseModel:
    save_model(MODELS[name], directory)
    return load_base(str(directory), device=device, compute_dtype=dtype, progress=False)


def attach(base: BaseModel) -> LoraBatch:
    store = DeviceStore(base.site_table, base.compute_dtype, base.device, 4 * 2**20, max_slots=4)
    for seed, rank in enumerate((3, 8)):
        adapter = HandMade(base.site_table, seed, std=0.1).lora(rank, *base.site_table.by_module)
        assert store.install(adapter.pack(base.compute_dtype)) == seed
    batch = LoraBatch(store, max_tokens=256, max_segments=16)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, batch))
    return batch


@pytest.fixture(scope="module", params=MODELS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    base = load(request.param, tmp_path_factory.mktemp(request.param), torch.float32)
    return Adapted(base, attach(base))


@contextlib.contextmanager
def transformers_forward(base: BaseModel) -> Iterator[None]:
    lean, base.lean = base.lean, None
    try:
        yield
    finally:
        base.lean = lean


def random_sequences() -> list[list[int]]:
    return [torch.randint(3, VOCAB, (n,)).tolist() for n in LENGTHS]


def run(adapted: Adapted, sequences: list[list[int]], schedule: list[list[tuple[int, int]]]) -> list[Tensor]:
    """Logits of every token of each sequence, whatever step it ran in."""
    driver = PagedDriver(adapted.base, sequences)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for counts in schedule:
        adapted.batch.prepare([(SLOTS[i], n) for i, n in counts])
        for i, logits in driver.step(counts).items():
            parts[i].append(logits)
    return [torch.cat(each) for each in parts if each]


SCHEDULES = {
    "prefill": [list(enumerate(LENGTHS))],
    "decode": [[(i, n - 6)] for i, n in enumerate(LENGTHS) if n > 6] + [[(0, 1), (2, 1), (3, 1), (4, 1)]] * 6,
    "chunks-and-decodes": [[(0, 22), (2, 7)], [(0, 1), (1, 1), (2, 30), (4, 5)], [(2, 1), (3, 9), (4, 1)], [(4, 25)]],
}


class TestEqualsTransformers:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_logits_of_base_and_adapted_rows(self, adapted: Adapted, schedule: str) -> None:
        assert adapted.base.lean is not None
        sequences = random_sequences()
        got = run(adapted, sequences, SCHEDULES[schedule])
        with transformers_forward(adapted.base):
            want = run(adapted, sequences, SCHEDULES[schedule])
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)

    def test_bf16_is_as_close_to_fp32_as_transformers_is(self, tmp_path: Path) -> None:
        """The rounding points are the same but for the rotation, which has fewer."""
        logits = {}
        for dtype in (torch.float32, torch.bfloat16):
            base = load("qwen3", tmp_path / str(dtype), dtype)
            inputs = step_inputs(base, [40, 60, 3])
            inputs["ids"] = torch.arange(103)[None] * 7 % VOCAB
            logits[dtype, "lean"] = base.logits(**inputs)
            with transformers_forward(base):
                logits[dtype, "transformers"] = base.logits(**inputs)
        exact = logits[torch.float32, "transformers"]
        error = {who: (logits[torch.bfloat16, who] - exact).square().mean().sqrt() for who in ("lean", "transformers")}
        assert 0 < error["lean"] < 1.3 * error["transformers"]

    def test_only_rows_that_sample_reach_the_head(self, adapted: Adapted) -> None:
        inputs = step_inputs(adapted.base, [6, 3, 1])
        adapted.batch.prepare([(-1, 10)])
        everything = adapted.base.logits(**inputs)
        rows = torch.tensor([9, 5])
        some = adapted.base.logits(**inputs, rows=rows)
        assert some.shape == (2, VOCAB) and some.dtype == torch.float32
        torch.testing.assert_close(some, everything[rows], atol=TOLERANCE, rtol=TOLERANCE)

    def test_padding_rows_change_nothing(self, adapted: Adapted) -> None:
        """Rows of a padded batch belong to no sequence and no segment; their cache slot is -1."""
        inputs = step_inputs(adapted.base, [1, 1, 1])
        adapted.batch.prepare([(-1, 1), (0, 2)])
        want = adapted.base.logits(**inputs)
        padded = step_inputs(adapted.base, [1, 1, 1], padding=2)
        padded["ids"][:, :3] = inputs["ids"]
        before = [cache.clone() for cache in padded["paged"].cache.keys]
        got = adapted.base.logits(**padded)[:3]
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
        for old, new in zip(before, padded["paged"].cache.keys, strict=True):
            assert int((old != new).any(-1).any(0).sum()) == 3  # as many entries as rows that are no padding


class Counting(nn.Module):
    """A site that counts."""

    def __init__(self, linear: nn.Module, site: Site, calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.linear, self.site, self.calls = linear, site, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.site.name, len(x)))
        return self.linear(x)


def test_each_site_runs_once_a_step_whatever_wraps_it(tmp_path: Path) -> None:
    base = load("qwen2", tmp_path, torch.float32)
    inputs = step_inputs(base, [5, 1])
    before = base.logits(**inputs)
    calls: list[tuple[str, int]] = []
    base.wrap_sites(lambda linear, site: Counting(linear, site, calls))
    assert torch.equal(base.logits(**inputs), before)
    assert calls == [(site.name, 6) for site in base.site_table.sites]
    calls.clear()
    base.logits(**inputs, rows=torch.tensor([5]))
    assert calls[-1] == ("lm_head", 1)


def step_inputs(base: BaseModel, lengths: list[int], padding: int = 0) -> dict[str, Any]:
    """Arguments of `BaseModel.logits` for fresh prompts, one block of 64 tokens each."""
    device, block = base.device, 64
    rows = torch.arange(sum(lengths) + padding)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in (*lengths, *[1] * padding)])
    slots = torch.cat([i * block + torch.arange(n) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    cache = base.new_kv_cache(len(lengths), block)
    paged = PagedStep(
        cache=cache,
        kv_slots=slots.to(device),
        query_starts=starts.int().to(device),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=torch.arange(len(lengths), dtype=torch.int32, device=device)[:, None],
        max_query_len=max(lengths),
        max_context_len=max(lengths),
    )
    ids = torch.randint(3, VOCAB, (1, len(rows)), device=device)
    return {"ids": ids, "positions": positions[None].to(device), "paged": paged}


def read(config: PretrainedConfig, change: Callable[[Any], object] = lambda model: None) -> object:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = SiteTable(describe_sites(model, plan_sites(model)))
    change(model)
    return read_lean_modules(model, sites)


class Derived(LlamaForCausalLM):
    pass


class OtherNorm(nn.LayerNorm):
    pass


class TestModelsThatItDoesNotKnow:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_models_of_this_file_are_known(self, name: str) -> None:
        assert read(MODELS[name]) is not None

    @pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3"])
    def test_other_families(self, family: str) -> None:
        assert read(family_config(family)) is None

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_act": "gelu"},
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
        ],
        ids=["activation", "frequencies-by-length", "part-of-a-head-rotated"],
    )
    def test_configurations(self, fields: dict[str, Any]) -> None:
        assert read(LlamaConfig(**COMMON)) is not None
        assert read(LlamaConfig(**COMMON | fields)) is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: setattr(model, "__class__", Derived),
            lambda model: setattr(model.model, "norm", OtherNorm(128)),
            lambda model: setattr(model.model.layers[1], "input_layernorm", OtherNorm(128)),
            lambda model: setattr(model.model.layers[2].post_attention_layernorm, "variance_epsilon", 0.1),
            lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.GELU()),
            lambda model: setattr(model.model.embed_tokens, "max_norm", 1.0),
            lambda model: model.model.layers.pop(-1),
        ],
        ids=["class", "last-norm", "norm", "epsilon", "activation", "embedding", "layers"],
    )
    def test_modules(self, change: Callable[[Any], object]) -> None:
        assert read(LlamaConfig(**COMMON), change) is None


@pytest.mark.gpu
@needs_cuda
class TestGpu:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_logits_of_base_and_adapted_rows(self, name: str, schedule: str, tmp_path: Path) -> None:
        base = load(name, tmp_path, torch.float32, GPU)
        TestEqualsTransformers().test_logits_of_base_and_adapted_rows(Adapted(base, attach(base)), schedule)

    def test_no_step_waits_for_the_device(self, tmp_path: Path) -> None:
        base = load("qwen3", tmp_path, torch.bfloat16, GPU)
        batch = attach(base)
        batch.prepare([(-1, 5), (0, 2), (1, 1)])
        inputs, rows = step_inputs(base, [5, 1, 1, 1]), torch.tensor([4, 7], device=GPU)
        base.logits(**inputs, rows=rows)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            base.logits(**inputs, rows=rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_captured_step_replays_with_other_tokens(self, tmp_path: Path) -> None:
        base = load("qwen3", tmp_path, torch.bfloat16, GPU)
        attach(base).prepare([(-1, 1), (0, 2), (1, 1)])
        inputs = step_inputs(base, [1, 1, 1, 1])
        with torch.inference_mode():
            with overlap.rehearsal():
                base.logits(**inputs)  # compiles what a capture launches
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = base.logits(**inputs)
            inputs["ids"].copy_(torch.randint(3, VOCAB, (1, 4)))
            graph.replay()
            replayed = out.clone()
            # bf16; the head's matmul may be split otherwise under a capture.
            torch.testing.assert_close(replayed, base.logits(**inputs), atol=2e-2, rtol=2e-2)
