"""The device runs out of memory: at start that is said before anything is served, later it ends one request or load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.device_store import DeviceStore, Placement
from lorikeet.adapters.errors import AdapterMemoryError
from lorikeet.adapters.packing import PackedAdapter
from lorikeet.server.app import App
from lorikeet.server.engine.errors import DeviceMemoryError
from lorikeet.server.errors import ConfigError
from transformers import AutoModelForCausalLM, LlamaConfig

from ..base.family_models import VOCAB, save_tokenizer
from ..devices import GPU, Place, gpu_place, needs_cuda
from ..golden.format_oracle import random_prompts
from ..golden.in_process import Call, greedy_params, serving
from .answers import answer_all, assert_alike
from .worlds import FP32, World, make_world, requests, server

MIB = 2**20
CONTEXT = 32768
# In fp32 the MLP of the long prompt alone makes tensors of 512 and 256 MiB.
LONG = 32000
LEFT_BYTES = 96 * MIB


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few weights and a long context."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Torch may take so many bytes more than it holds now; the engine is idle."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + size) / total, GPU)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def ask(app: App, name: str, prompt: list[int], tokens: int) -> Call:
    return Call(app, name, "", prompt, greedy_params(tokens))


@needs_cuda
@pytest.mark.gpu
def test_prompt_that_does_not_fit_fails_alone(wide_model: Path) -> None:
    short, other, long = random_prompts(3, (20, 21), VOCAB, seed=1)
    long = (long * LONG)[:LONG]
    sizes = {"step_tokens": CONTEXT, "max_running": 4, "kv_cache_bytes": "64MiB"}
    with serving(wide_model, device=GPU, **sizes) as app:
        quiet = [ask(app, f"quiet {i}", prompt, 400).result().token_ids for i, prompt in enumerate((short, other))]
        with memory_left(LEFT_BYTES):
            running = ask(app, "running", short, 400)
            failed = ask(app, "long", long, 4).result().failed
            assert failed is not None and isinstance(failed.error, DeviceMemoryError), failed
            assert running.result().token_ids == quiet[0]
            assert ask(app, "next", other, 400).result().token_ids == quiet[1]
        answer = ask(app, "again", long, 4).result()
        assert answer.finished is not None, answer.failed


@needs_cuda
@pytest.mark.gpu
def test_cache_that_does_not_fit_is_refused_at_start(wide_model: Path) -> None:
    free, _ = torch.cuda.mem_get_info(GPU)
    with pytest.raises(ConfigError, match="--kv-cache-bytes"), serving(wide_model, device=GPU, kv_cache_bytes=2 * free):
        pass


@pytest.fixture(scope="module", params=[gpu_place("llama", "memory")])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    place: Place = request.param
    return make_world(place.family, tmp_path_factory.mktemp(place.family))


def test_adapter_that_finds_no_memory_fails_its_requests_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, *others = world.names
    write = DeviceStore.write
    left = iter(range(1))

    def failing(store: DeviceStore, placement: Placement, packed: PackedAdapter, *how: bool) -> None:
        """The first copy stops half-way."""
        if next(left, None) is None:
            return write(store, placement, packed, *how)
        store.arena[placement.start : placement.start + packed.data.numel() // 2].fill_(float("nan"))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with server(world) as app:
        wanted = requests(others, 9, tokens=60, seed=4)
        quiet = answer_all(app, wanted)
        (prompt,) = random_prompts(1, (20, 21), VOCAB, seed=5)
        whole = Call(app, "whole", victim, prompt, greedy_params(10)).result()
        # Away from the device, and the same content again.
        app.manager.unload(victim)
        app.manager.load(victim)
        monkeypatch.setattr(DeviceStore, "write", failing)
        running = [
            Call(app, f"running {i}", dict(w.members), w.prompt, greedy_params(w.tokens)) for i, w in enumerate(wanted)
        ]
        failed = Call(app, "victim", victim, prompt, greedy_params(10)).result().failed
        assert failed is not None and isinstance(failed.error, AdapterMemoryError), failed
        assert all(call.result().finished for call in running)
        assert Call(app, "again", victim, prompt, greedy_params(10)).result().token_ids == whole.token_ids
        assert_alike(quiet, answer_all(app, wanted), FP32)
