"""What does not fit into device memory is refused before it is allocated, with what to lower to what."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from lorikeet.adapters.sites import Site, SiteTable, Slice
from lorikeet.server.config import GIB, MIB, ServerConfig
from lorikeet.server.engine.graph_sizes import GraphSizes
from lorikeet.server.errors import ConfigError
from lorikeet.server.memory_plan import FreeMemory, MemorySettings, ModelSize, demands, plan_kv_cache
from lorikeet.server.resolve import resolve_kv_blocks

# Llama-3-8B: 32 layers of 8 KV heads of 128.
LLAMA = ModelSize(
    hidden=4096,
    widest=4096 + 28672,
    largest_weight=4096 * 28672,
    vocab=128256,
    num_sites=129,
    max_slices=3,
    itemsize=2,
    kv_block_bytes=2 * 32 * 8 * 128 * 16 * 2,
)


def device(free: int) -> FreeMemory:
    return FreeMemory(free, "The device")


def settings(**changes) -> MemorySettings:
    values = {
        "kv_cache_bytes": None,
        "adapter_device_bytes": 256 * MIB,
        "adapter_slots": 1024,
        "step_tokens": 512,
        "max_running": 128,
        "max_blocks": 512,
        "graph_sizes": GraphSizes,
    }
    return MemorySettings(**(values | changes))


def rest(of: MemorySettings) -> int:
    return sum(demands(LLAMA, of).values())


def test_auto_takes_workspace_and_graphs_into_account():
    free = 70 * GIB
    planned = plan_kv_cache(LLAMA, settings(), device(free))
    assert planned == int(0.9 * (free - rest(settings())))
    assert rest(settings()) > rest(settings(graph_sizes=None)) + 88 * 8 * MIB
    assert plan_kv_cache(LLAMA, settings(graph_sizes=None), device(free)) > planned
    for larger in ({"step_tokens": 8192}, {"max_running": 256}, {"adapter_device_bytes": GIB}, {"adapter_slots": 9999}):
        assert plan_kv_cache(LLAMA, settings(**larger), device(free)) < planned, larger


def test_given_cache_is_taken_as_it_is_where_it_fits():
    given = settings(kv_cache_bytes=10 * GIB)
    exactly = rest(given) + 10 * GIB
    assert plan_kv_cache(LLAMA, given, device(exactly)) == 10 * GIB
    with pytest.raises(ConfigError):
        plan_kv_cache(LLAMA, given, device(exactly - 1))


def flags_of(message: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z-]+) by [^,]+, to (\w+)", message))


def applied(base: MemorySettings, name: str, value: str) -> MemorySettings:
    number = int(value.removesuffix("MiB")) * (MIB if value.endswith("MiB") else 1)
    return settings(
        **{field: getattr(base, field) for field in base.__slots__}
        | {name.removeprefix("--").replace("-", "_"): number}
    )


def test_error_says_what_is_needed_and_free_and_each_advice_is_enough_and_no_more_than_that():
    rng = random.Random(3)
    seen: set[str] = set()
    for _ in range(60):
        base = settings(
            kv_cache_bytes=rng.choice([None, rng.randint(1, 40) * GIB]),
            adapter_device_bytes=rng.randint(1, 20000) * MIB,
            step_tokens=rng.choice([512, 8192, 65536]),
            max_running=rng.choice([16, 128, 512]),
        )
        needed = rest(base) + (LLAMA.kv_block_bytes if base.kv_cache_bytes is None else base.kv_cache_bytes)
        missing = rng.choice([1, 100 * MIB, 2 * GIB, 9 * GIB])
        free = device(max(0, needed - missing))
        with pytest.raises(ConfigError) as caught:
            plan_kv_cache(LLAMA, base, free)
        message = caught.value.message
        assert (
            f"The device has {free.nbytes / GIB:.2f} GiB free" in message
            and f"{needed / GIB:.2f} GiB are needed" in message
        )
        advice = flags_of(message)
        seen |= advice.keys()
        for name, value in advice.items():
            plan_kv_cache(LLAMA, applied(base, name, value), free)  # is enough
            one_more = f"{int(value.removesuffix('MiB')) + 1}{'MiB' if value.endswith('MiB') else ''}"
            with pytest.raises(ConfigError):
                plan_kv_cache(LLAMA, applied(base, name, one_more), free)
        if "--no-cuda-graphs" in message:
            seen.add("--no-cuda-graphs")
            without = {f: getattr(base, f) for f in base.__slots__} | {"graph_sizes": None}
            plan_kv_cache(LLAMA, settings(**without), free)
        if not advice and "--no-cuda-graphs" not in message:
            seen.add("none")
            assert "together" in message and "larger device" in message
    assert seen == {
        "--kv-cache-bytes", "--adapter-device-bytes", "--step-tokens", "--max-running", "--no-cuda-graphs", "none"
    }  # fmt: skip


def fake_base(device: str) -> SimpleNamespace:
    sites = [
        Site(0, "layers.0.qkv_proj", 0, 64, (Slice("q", 64), Slice("k", 32))),
        Site(1, "lm_head", -1, 64, (Slice("lm_head", 500),), is_head=True),
    ]
    return SimpleNamespace(
        device=torch.device(device),
        compute_dtype=torch.bfloat16,
        site_table=SiteTable(sites),
        kv_block_bytes=lambda block_size: 1000 * block_size,
    )


def test_blocks_on_a_cpu_and_on_cuda():
    plenty = device(8 * GIB)
    for free in (plenty, None):
        assert resolve_kv_blocks(ServerConfig(), fake_base("cpu"), 4096, free) == 512 * MIB // 16000
        assert resolve_kv_blocks(ServerConfig(kv_cache_bytes="1MiB"), fake_base("cpu"), 4096, free) == MIB // 16000
    for name in ("cpu", "cuda:0"):
        with pytest.raises(ConfigError, match=r"one block of 16 tokens needs 16000\. Raise --kv-cache-bytes"):
            resolve_kv_blocks(ServerConfig(kv_cache_bytes=15999), fake_base(name), 4096, plenty)
    cuda = fake_base("cuda:0")
    assert resolve_kv_blocks(ServerConfig(kv_cache_bytes="1GiB"), cuda, 4096, plenty) == GIB // 16000
    with_graphs = resolve_kv_blocks(ServerConfig(), cuda, 4096, plenty)
    assert 5 * GIB // 16000 < with_graphs < resolve_kv_blocks(ServerConfig(cuda_graphs=False), cuda, 4096, plenty)
    with pytest.raises(ConfigError, match=r"0\.50 GiB free .* missing\. Lower one of: .*--no-cuda-graphs|together"):
        resolve_kv_blocks(ServerConfig(), cuda, 4096, device(GIB // 2))
