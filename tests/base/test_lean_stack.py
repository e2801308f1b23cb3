"""All layers in one native call give the bits that their operators give one by one, whatever adapters do meanwhile."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.layers import LoraLinear
from lorikeet.adapters.lora_batch import LoraBatch
from lorikeet.kernels import activation, attention_cpu, decoder, linear, lora_cpu, lora_site, nf4_cpu, norm, rope
from lorikeet.kernels.native.functions import library_name
from lorikeet.kernels.nf4_tiles import Layout
from lorikeet.server.base.lean_decoder import LeanDecoder
from lorikeet.server.base.linears import NF4Linear
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from ..adapters.hand_made import HandMade
from ..devices import CPU
from ..engine.adapted_runner import AdaptedRunner
from ..kernels.native_libraries import multiply_in_pairs, two_threads, use_library
from .family_models import COMMON, VOCAB, family_config, save_model
from .paged_driver import PagedDriver

__all__ = ["two_threads"]
pytestmark = pytest.mark.skipif(library_name() is None, reason="no compiled kernels")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BIASES = LlamaConfig(**COMMON, head_dim=48, attention_bias=True, mlp_bias=True)

LENGTHS = (23, 1, 40, 9, 31)
# Steps of (sequence, rows): prompts in chunks beside sequences that decode.
SCHEDULE = (
    ((0, 22), (2, 7)),
    ((0, 1), (1, 1), (2, 30), (4, 5)),
    ((2, 1), (3, 8), (4, 1)),
    ((2, 1), (3, 1), (4, 1)),
    ((4, 24), (2, 1)),
)
MAX_SLOTS = 6
# Slot of each sequence; the last is a composition of all three adapters.
BASE_ONLY, MIXED = (-1, -1, -1, -1, -1), (-1, 0, 1, 2, MAX_SLOTS)
MEMBERS = {MAX_SLOTS: ((0, 0.5), (2, -0.7), (1, 1.2))}


class Adapted(NamedTuple):
    """A base and its adapters."""

    base: BaseModel
    store: DeviceStore
    batch: LoraBatch

    def install(self, seed: int, rank: int) -> int:
        """A random adapter of all linears, with affines at some; its slot."""
        leaves = list(self.base.site_table.by_module)
        adapter = HandMade(self.base.site_table, seed, std=0.05).lora(rank, *leaves).affine(*leaves[seed::5])
        slot = self.store.install(adapter.pack(self.base.compute_dtype))
        assert slot is not None
        return slot


def adapt(config: PretrainedConfig, dtype: torch.dtype, directory: Path) -> Adapted:
    save_model(config, directory)
    base = load_base(str(directory), device=CPU, compute_dtype=dtype, progress=False)
    store = DeviceStore(base.site_table, dtype, CPU, 4 * 2**20, max_slots=MAX_SLOTS)
    batch = LoraBatch(store, max_tokens=256, max_segments=16)
    base.wrap_sites(lambda linear, site: LoraLinear(linear, site, batch))
    adapted = Adapted(base, store, batch)
    assert [adapted.install(seed, rank) for seed, rank in enumerate((3, 16, 8))] == [0, 1, 2]
    return adapted


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((family_config("llama"), FP32), id="llama"),
        pytest.param((family_config("llama"), BF16), id="llama-bf16"),
        pytest.param((family_config("mistral"), FP16), id="mistral-fp16"),  # window
        pytest.param((family_config("qwen2"), FP32), id="qwen2"),  # some biases, a window in some layers
        pytest.param((family_config("qwen3"), FP16), id="qwen3-fp16"),  # norms of heads
        pytest.param((BIASES, FP16), id="llama-biases-fp16"),
    ],
)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapt(*request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapt(family_config("llama"), FP32, tmp_path_factory.mktemp("llama"))


def bits(tensor: Tensor) -> Tensor:
    """For comparisons to which a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def run(
    adapted: Adapted,
    sequences: Sequence[Sequence[int]],
    slots: Sequence[int],
    one_by_one: bool,
    before: Callable[[int], object] = lambda step: None,
) -> list[Tensor]:
    """The logits of each step, and what the cache holds after the last one; `before` is called with a step's number."""
    lean = adapted.base.lean
    assert lean is not None
    driver = PagedDriver(adapted.base, sequences)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "one_by_one", one_by_one)
        if not one_by_one:
            patch.delattr(LeanDecoder, "_run_layers")
        for number, counts in enumerate(SCHEDULE):
            before(number)
            adapted.batch.prepare([(slots[i], n) for i, n in counts], expand=MEMBERS.__getitem__)
            found += driver.step(counts).values()
    return found + driver.cache.keys + driver.cache.values


def check_both(adapted: Adapted, slots: Sequence[int]) -> None:
    sequences = [torch.randint(3, VOCAB, (n,)).tolist() for n in LENGTHS]
    want, got = (run(adapted, sequences, slots, one_by_one) for one_by_one in (True, False))
    steps = sum(map(len, SCHEDULE))
    assert all(logits.isfinite().all() for logits in want[:steps])
    for a, b in zip(want, got, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("slots", [BASE_ONLY, MIXED], ids=["base", "mixed"])
class TestEqualBits:
    def test_one_thread(self, adapted: Adapted, slots: Sequence[int]) -> None:
        check_both(adapted, slots)

    def test_two_threads(self, adapted: Adapted, slots: Sequence[int], two_threads: None) -> None:
        check_both(adapted, slots)

    def test_portable_library(self, adapted: Adapted, slots: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
        use_library_everywhere(monkeypatch, "portable")
        check_both(adapted, slots)


def use_library_everywhere(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    for module, signatures in (
        (nf4_cpu, {"_native_linear": ("lorikeet_nf4_linear", *nf4_cpu._ARGUMENTS)}),
        (nf4_cpu, {"_native_pair_linear": ("lorikeet_nf4_pair_linear", *nf4_cpu._ARGUMENTS)}),
        (linear, {"_native_linear": ("lorikeet_linear", *linear._ARGUMENTS)}),
        (linear, {"_native_pair_linear": ("lorikeet_pair_linear", *linear._ARGUMENTS[1:])}),
        (norm, {"_norm": norm._NORM, "_norm_briefly": norm._NORM}),
        (rope, {"_rotate": rope._ROTATE, "_rotate_briefly": rope._ROTATE}),
        (activation, {"_activate": activation._ACTIVATE, "_activate_briefly": activation._ACTIVATE}),
        (attention_cpu, {"_attend": attention_cpu._ATTENTION, "_attend_briefly": attention_cpu._ATTENTION}),
        (lora_site, {"_add": lora_site._ADD, "_add_briefly": lora_site._ADD}),
        (lora_cpu, {"_affine": lora_cpu._AFFINE, "_affine_briefly": lora_cpu._AFFINE}),
        (decoder, {"_run_layers": decoder._RUN_LAYERS}),
    ):
        use_library(monkeypatch, library, module, signatures)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
class TestPairs:
    """As CPUs with AVX512-BF16 compute in bf16, which is not what others do."""

    def test_equal_bits(self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        multiply_in_pairs(monkeypatch)
        adapted = adapt(family_config(family), BF16, tmp_path)
        linears = [each for each in adapted.base.model.modules() if type(each) is NF4Linear]
        assert linears and all(each.nf4.layout is Layout.PAIRS for each in linears)
        for slots in (BASE_ONLY, MIXED):
            check_both(adapted, slots)

    def test_as_near_to_fp32_as_other_bf16(self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sequences = [torch.randint(3, VOCAB, (n,)).tolist() for n in LENGTHS]
        steps = sum(map(len, SCHEDULE))

        def logits(dtype: torch.dtype) -> Tensor:
            adapted = adapt(family_config(family), dtype, tmp_path)
            return torch.cat(run(adapted, sequences, MIXED, one_by_one=False)[:steps]).double()

        multiply_in_pairs(monkeypatch, False)
        exact, usual = logits(FP32), logits(BF16)
        multiply_in_pairs(monkeypatch)
        in_pairs = logits(BF16)
        assert not torch.equal(in_pairs, usual)
        # Rounding a code's value is one more rounding for each weight beside those of every activation.
        assert (in_pairs - exact).norm() < 1.5 * (usual - exact).norm()


class TestAdaptersThatComeAndGo:
    """What the native call knows of adapters is where their tables are; what these say may change at any step."""

    def test_replaced_and_moved_between_steps(self, tmp_path: Path) -> None:
        sequences = [torch.randint(3, VOCAB, (n,)).tolist() for n in LENGTHS]
        found = []
        for one_by_one in (True, False):
            llama = adapt(family_config("llama"), FP32, tmp_path / str(one_by_one))

            def change(step: int, llama: Adapted = llama) -> None:
                if step == 1:  # another adapter, of another rank, in a slot that the last step used
                    llama.store.remove(1)
                    assert llama.install(seed=41, rank=5) == 1
                elif step == 2:  # leaves a gap, into which the others then move
                    llama.store.remove(0)
                    assert llama.store.compact() > 0
                    assert llama.install(seed=42, rank=16) == 0

            found.append(run(llama, sequences, MIXED, one_by_one, change))
        for a, b in zip(*found, strict=True):
            assert torch.equal(bits(a), bits(b))

    def test_linears_wrapped_anew(self, llama: Adapted) -> None:
        batch = LoraBatch(llama.store, max_tokens=256, max_segments=16)
        replaced: list[nn.Module] = []

        def wrap(linear: nn.Module, site: object) -> nn.Module:
            assert isinstance(linear, LoraLinear)
            replaced.append(linear)
            return LoraLinear(linear.base, linear.site, batch)

        llama.base.wrap_sites(wrap)
        check_both(Adapted(llama.base, llama.store, batch), MIXED)
        again = iter(replaced)
        llama.base.wrap_sites(lambda linear, site: next(again))
        check_both(llama, MIXED)


class TestStepsThatItDoesNotKnow:
    def test_heads_whose_attention_runs_in_plain_torch(self, tmp_path: Path) -> None:
        sizes = COMMON | {"hidden_size": 192, "num_attention_heads": 16}
        base = adapt(LlamaConfig(**sizes, head_dim=12), FP32, tmp_path).base
        assert base.lean is not None and base.lean._stack is None

    def test_tensors_of_their_own_in_layers_and_around_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = AdaptedRunner("qwen3", tmp_path)
        lean = world.base.lean
        assert lean is not None
        one_by_one: list[str] = []
        run_layers = LeanDecoder._run_layers
        for kind in ("lora", "head", "affine", "embedding", "larger", "tokens", "own_head", "norms", "linears"):
            streams = [world.sequence(0, 9, (kind, 1.0)), world.sequence(1, 9)]
            monkeypatch.setattr(lean, "one_by_one", True)
            want = torch.cat(world.step([(stream, 9, True) for stream in streams]))
            monkeypatch.setattr(lean, "one_by_one", False)
            with monkeypatch.context() as patch:
                patch.setattr(LeanDecoder, "_run_layers", lambda *a, k=kind: (one_by_one.append(k), run_layers(*a))[1])
                for stream in streams:
                    stream.done = 0
                got = torch.cat(world.step([(stream, 9, True) for stream in streams]))
            assert torch.equal(bits(got), bits(want)), kind
        assert one_by_one == ["norms", "linears"]

    def test_without_a_library_there_is_none(self, llama: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
        sequences = [torch.randint(3, VOCAB, (n,)).tolist() for n in LENGTHS]
        lean = llama.base.lean
        assert lean is not None
        want = run(llama, sequences, BASE_ONLY, one_by_one=True)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_run_layers", None)
            lean.connect(llama.base.site_module)
            driver = PagedDriver(llama.base, sequences)
            got = []
            for counts in SCHEDULE:
                llama.batch.prepare([(-1, n) for _, n in counts])
                got += driver.step(counts).values()
        lean.connect(llama.base.site_module)
        assert all(map(torch.equal, want, got))
