"""Traps of adapters' lifecycle seen in other servers' code and issue trackers, each on a whole server but for gRPC.

The features of the field and where they break are listed with their sources; a test is named after what goes wrong
there. What concerns an adapter's content is in test_traps_content.py.
"""

import json
import shutil
import threading

import pytest
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterUnloadedError, ServingError
from lorikeet.adapters.info import AdapterState, Tier

from ..adapters.managing import CONFIG, WEIGHTS, check, start, wait_until
from .conftest import NAMES, HeldCall, answer, call


@pytest.fixture
def serve(serve):
    """The same, and what must always hold is checked at the end."""
    apps = []

    def start_server(**settings):
        apps.append(serve(**settings))
        return apps[-1]

    yield start_server
    for app in apps:
        check(app.manager)


def test_unknown_adapter_is_not_the_base(serve, put, prompt):
    """text-generation-inference: `ADAPTER_TO_INDEX.get(id, 0)`, and 0 is the base."""
    put("plain")
    app = serve()
    app.manager.load("plain")
    for name in ("nope", "Plain", "plain ", "plain-2", "plain@0000", "none", "0"):
        with pytest.raises(ServingError) as raised:
            call(app, name, prompt)
        assert raised.value.code in ("NOT_FOUND", "INVALID_ARGUMENT")
    app.manager.unload("plain")
    with pytest.raises(AdapterNotFoundError):
        call(app, "plain", prompt)


def test_base_request_does_not_inherit_an_adapter(world, serve, put, prompt):
    """llama.cpp: a request without `lora` falls back to what the slot had, and to its cache."""
    put("plain"), put("narrow")
    app = serve()
    app.manager.load("plain"), app.manager.load("narrow")
    for name in ("plain", "", "narrow", "", "plain"):
        world.check(name, prompt, answer(app, name, prompt).token_ids)
    calls = [(name, call(app, name, prompt)) for name in ("", "plain", "", "narrow", "")]
    for name, running in calls:
        world.check(name, prompt, running.result().token_ids)


def test_requests_of_other_adapters_are_not_disturbed(world, serve, put, prompt):
    """llama.cpp#10374: one global scale for all; and batches of one LoRA configuration only."""
    for name in NAMES:
        put(name)
    app = serve()
    for name in NAMES:
        app.manager.load(name)
    calls = [(name, call(app, name, prompt[i:])) for i, name in enumerate([*NAMES, "", *NAMES])]
    for i, (name, running) in enumerate(calls):
        world.check(name, prompt[i:], running.result().token_ids)


def test_slot_that_is_used_again_keeps_nothing(world, serve, put, prompt):
    """sglang#7426, #8263: buffers contaminated by the adapter before, where the new one lacks a module."""
    put("plain"), put("narrow"), put("ragged")
    app = serve(adapter_slots=1)
    for name in ("plain", "narrow", "plain", "ragged", "narrow", ""):
        if name:
            app.manager.load(name)
        world.check(name, prompt, answer(app, name, prompt).token_ids)
    assert app.manager.snapshot().names_by_tier()[Tier.DEVICE] == ["narrow"]


def test_reload_of_the_same_name_and_path_does_not_hit_old_kv(world, serve, put, prompt):
    """vllm#42125, #44939, LoRAX's lru_cache, TensorRT-LLM: cached by name, path or id, and served after a reload."""
    put("plain")
    app = serve()
    app.manager.load("plain")
    first = answer(app, "plain", prompt)
    assert answer(app, "plain", prompt).finished.cached_tokens == 32
    put("plain-2", "plain")
    app.manager.load("plain")
    second = answer(app, "plain", prompt)
    assert second.finished.cached_tokens == 0 and second.token_ids != first.token_ids
    world.check("plain-2", prompt, second.token_ids)
    app.manager.rollback("plain")
    world.check("plain", prompt, answer(app, "plain", prompt).token_ids)


def test_name_that_is_used_again_after_an_unload_is_another_adapter(world, serve, put, prompt):
    """sglang#7426 and #8263: unload, then load other weights under the name; some of the old are still used."""
    app = serve(adapter_slots=1)
    for content in ("plain", "plain-2", "narrow", "plain"):
        put(content, "x")
        app.manager.load("x")
        result = answer(app, "x", prompt)
        world.check(content, prompt, result.token_ids)
        app.manager.unload("x")
        shutil.rmtree(app.config.adapters[0] / "x")


def test_replacement_does_not_change_a_running_request(world, serve, put, prompt):
    """vLLM's `load_inplace` swaps weights under the same id: a request changes its adapter mid-generation."""
    put("plain")
    app = serve()
    app.manager.load("plain")
    with HeldCall(app, "plain", prompt) as running:
        put("plain-2", "plain")
        app.manager.load("plain")
        versions = app.manager.describe("plain").versions
        assert [v.state for v in versions] == [AdapterState.READY, AdapterState.DRAINING]
        late = call(app, "plain", prompt)
    world.check("plain", prompt, running.result().token_ids)
    world.check("plain-2", prompt, late.result().token_ids)
    wait_until(lambda: len(app.manager.list()) == 1, "the old version to go")


def test_replacement_never_makes_the_name_unknown(serve, put, prompt):
    """SGLang answers "already loaded": one must unload first, and requests fail until the load has ended."""
    put("plain"), put("plain-2")
    app = serve()
    app.manager.load("x", "plain")
    stop = threading.Event()

    asked = []

    def ask():
        while not stop.is_set():
            asked.append(app.manager.resolve("x"))
            app.manager.release(asked[-1])
            stop.wait(0.001)

    asking = start(ask)
    try:
        for i in range(40):
            count = len(asked)
            app.manager.load("x", ("plain-2", "plain")[i % 2])
            wait_until(lambda count=count: len(asked) > count or asking.done(), "a request meanwhile")
    finally:
        stop.set()
    assert asking.exception(20) is None and len({version.digest for version in asked}) == 2


def test_unload_frees_the_memory(serve, put, prompt):
    """vllm#54839: unload deletes the name only; the adapter stays in its slot."""
    for name in NAMES:
        put(name)
    app = serve()
    for name in NAMES:
        app.manager.load(name)
        answer(app, name, prompt, 2)
    assert app.manager.store.used_bytes > 0
    for name in NAMES:
        app.manager.unload(name)
    wait_until(lambda: app.manager.list() == [], "the last requests to be released")
    assert app.manager.snapshot().bytes_used == {Tier.HOST: 0, Tier.DEVICE: 0} and app.manager.store.used_bytes == 0


def test_unload_during_a_request_neither_waits_nor_blocks_other_loads(world, serve, put, prompt):
    """SGLang waits, without deadline and with a global lock, until the last request has ended."""
    put("plain"), put("narrow")
    app = serve()
    app.manager.load("plain")
    with HeldCall(app, "plain", prompt) as running:
        app.manager.unload("plain")
        app.manager.load("narrow")
        other = call(app, "narrow", prompt)
    world.check("plain", prompt, running.result().token_ids)
    world.check("narrow", prompt, other.result().token_ids)
    wait_until(lambda: [i.adapter_id for i in app.manager.list()] == ["narrow"], "the memory")


def test_running_request_does_not_need_the_folder_of_its_adapter(world, serve, put, prompt):
    """vLLM's Rust front end: after unload, the next step of a running request reads the adapter from disk again."""
    folder = put("plain")
    app = serve()
    app.manager.load("plain")
    with HeldCall(app, "plain", prompt) as running:
        app.manager.unload("plain")
        shutil.rmtree(folder)
    world.check("plain", prompt, running.result().token_ids)


def test_drain_has_a_deadline(serve, put, prompt):
    """SGLang: unload waits for ever for one long stream. Here its requests end with a clear status."""
    put("plain")
    app = serve(adapter_drain_timeout_s=0.01)
    app.manager.load("plain")
    with HeldCall(app, "plain", prompt, 400) as running:
        app.manager.unload("plain")
        wait_until(lambda: app.manager.list()[0].state is AdapterState.FAILED, "the deadline")
    failed = running.result().failed
    assert isinstance(failed.error, AdapterUnloadedError) and "unloaded or replaced" in failed.error.message
    wait_until(lambda: app.manager.list() == [], "the memory")
    assert app.manager.store.used_bytes == 0


def test_failed_load_does_not_kill_the_step_loop(world, serve, put, prompt):
    """vllm#13698, #11702, lorax#14: loading an adapter, a broken one at that, while requests run ends the server."""
    put("plain")
    app = serve()
    app.manager.load("plain")
    spoils = [
        lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 100),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / CONFIG).write_text("{"),
        lambda folder: (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": -1})),
    ]
    with HeldCall(app, "plain", prompt) as running:
        base = call(app, "", prompt)
        for i, spoil in enumerate(spoils):
            spoil(put("plain-2", f"broken-{i}"))
            with pytest.raises(ServingError):
                app.manager.load(f"broken-{i}")
            with pytest.raises(AdapterNotFoundError, match="failed to load"):
                call(app, f"broken-{i}", prompt)
        put("narrow")
        app.manager.load("narrow")
    world.check("plain", prompt, running.result().token_ids)
    world.check("", prompt, base.result().token_ids)
    world.check("narrow", prompt, answer(app, "narrow", prompt).token_ids)
    assert app.engine.stats().state == "serving"


def test_failed_copy_to_the_device_does_not_kill_the_step_loop(world, serve, put, prompt, monkeypatch):
    """lorax#14, #333: a panic when an adapter cannot be brought in."""
    put("plain"), put("narrow")
    app = serve()
    app.manager.load("plain"), app.manager.load("narrow")

    def broken(*_):
        raise RuntimeError("device trouble")

    with monkeypatch.context() as patch:
        patch.setattr(app.manager.store, "write", broken)
        failed = call(app, "plain", prompt).result().failed
    assert "could not be copied" in failed.error.message
    for name in ("narrow", ""):
        world.check(name, prompt, answer(app, name, prompt).token_ids)


def test_bytes_are_counted_and_not_adapters(serve, put, prompt):
    """lorax#53: memory runs out because the limit is a number of adapters."""
    for name in NAMES:
        put(name)
    app = serve(adapter_slots=64)
    sizes = {name: app.manager.load(name).bytes for name in NAMES}
    budget = sizes["plain"] + sizes["patterns"]
    app = serve(adapter_slots=64, adapter_device_bytes=budget, adapter_host_bytes=budget)
    for name in NAMES:
        app.manager.load(name)
    calls = [call(app, name, prompt, 4) for name in [*NAMES, *reversed(NAMES)]]
    for running in calls:
        assert running.result().finished is not None
        used = app.manager.snapshot().bytes_used
        assert used[Tier.DEVICE] <= budget and used[Tier.HOST] <= budget and app.manager.store.used_bytes <= budget


def test_rank_is_not_padded(serve, put):
    """vllm#14435, #2847: every slot is as large as the largest rank that may come. An adapter takes what it has."""
    put("narrow"), put("wide")
    app = serve()
    assert app.manager.load("narrow").bytes == 4 * 2 * (192 + 128)
    assert app.manager.load("wide").bytes == 4 * 3 * 70 * (128 + 64)


def test_base_request_takes_no_slot(world, serve, put, prompt):
    """SGLang: one of `max_loras_per_batch` is the base's."""
    put("plain")
    app = serve(adapter_slots=1)
    app.manager.load("plain")
    with HeldCall(app, "plain", prompt) as running:
        base = call(app, "", prompt)
    world.check("", prompt, base.result().token_ids)
    world.check("plain", prompt, running.result().token_ids)
    assert app.manager.get("plain").tier is Tier.DEVICE, "the base has pushed nothing out"


def test_more_adapters_than_slots_starve_nobody(world, serve, put, prompt):
    """sglang#15129, vllm#5830: head-of-line blocking when adapters exceed slots."""
    for name in NAMES:
        put(name)
    app = serve(adapter_slots=2)
    for name in NAMES:
        app.manager.load(name)
    calls = [(name, call(app, name, prompt[i % 7 :], 3), i) for i, name in enumerate([*NAMES, "", *NAMES])]
    for name, running, i in calls:
        world.check(name, prompt[i % 7 :], running.result().token_ids)
    assert len(app.manager.snapshot().names_by_tier()[Tier.DEVICE]) <= 2


def test_cancelled_request_does_not_keep_its_adapter(serve, put, prompt):
    """TensorRT-LLM#18407: an adapter stays pinned after its request was suspended."""
    put("plain"), put("narrow")
    app = serve(adapter_slots=1)
    app.manager.load("plain"), app.manager.load("narrow")
    with HeldCall(app, "plain", prompt, 400) as running:
        waiting = call(app, "narrow", prompt)
        for gone in (waiting, running):
            app.engine.abort(gone.request.request_id)
    for gone in (waiting, running):
        assert gone.result().failed is not None
    wait_until(lambda: all(info.in_flight == 0 for info in app.manager.list()), "both to be released")
    assert app.manager.snapshot().wanted == 0
    answer(app, "narrow", prompt, 2)
    app.manager.unload("plain"), app.manager.unload("narrow")
    wait_until(lambda: app.manager.store.used_bytes == 0, "the memory")


def test_idle_adapters_are_seen_in_the_metrics(serve, put, prompt):
    """vllm#45325, llm-d-router#2605: the one metric names running and waiting adapters; an idle one vanishes."""
    put("plain"), put("narrow")
    app = serve()
    app.manager.load("plain"), app.manager.load("narrow")
    answer(app, "plain", prompt, 2)
    assert app.manager.snapshot().names_by_tier() == {Tier.DISK: [], Tier.HOST: ["narrow"], Tier.DEVICE: ["plain"]}


def test_adapters_loaded_at_run_time_survive_a_restart(world, serve, put, prompt, tmp_path):
    """vllm#12174, production-stack#331, aibrix#129: what was loaded dynamically is gone after a restart."""
    source = put("plain", "some/where")
    first = serve(state_dir=tmp_path / "state")
    first.manager.load("bot", source)
    first.manager.set_alias("prod", [("bot", 1.0)])
    first.engine.stop(), first.manager.close(), first.state.close()
    shutil.rmtree(source)
    second = serve(state_dir=tmp_path / "state")
    second.manager.restore()
    second.manager.finish_restore()
    for name in ("bot", "prod"):
        world.check("plain", prompt, answer(second, name, prompt).token_ids)


def test_adapters_come_while_the_server_runs(world, serve, put, prompt):
    """text-generation-inference#2177, llama.cpp#10377: adapters at start-up only."""
    app = serve()
    world.check("", prompt, answer(app, "", prompt).token_ids)
    for name in ("plain", "rslora"):
        put(name)
        app.manager.load(name)
        world.check(name, prompt, answer(app, name, prompt).token_ids)
