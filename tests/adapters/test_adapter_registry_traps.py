"""Mistakes of other multi-LoRA servers, as far as bookkeeping can make or avoid them. Each test is named after one."""

import pytest
from lorikeet.adapters.errors import AdapterInvalidError, AdapterNotFoundError, AdapterUnloadedError
from lorikeet.adapters.info import Tier
from lorikeet.adapters.rules import check_integrity

from .registry_world import World


@pytest.fixture
def world():
    world = World()
    yield world
    check_integrity(world.registry)


def test_unknown_adapter_is_served_by_the_base(world):
    """TGI looks an unknown id up as 0, the base."""
    world.set_alias("prod", world.load("a", "abcd"))
    for name, prefix in (("nope", ""), ("nope", "abcd"), ("a", "0123"), ("A", ""), ("", "")):
        with pytest.raises(AdapterNotFoundError):
            world.resolve(name, prefix)
    world.unload("a")
    with pytest.raises(AdapterNotFoundError):
        world.resolve("a")


def test_base_requests_take_a_slot_of_an_adapter(world):
    """SGLang: one of `max_loras_per_batch` is the base's. Here as many adapters run at once as there are slots."""
    for name in "abcd":
        world.load(name)
    running = [world.run(name) for name in "abcd"]
    assert len({world.record(version).slot for version in running}) == world.registry.memory.max_slots == 4


def test_limit_counts_adapters_and_not_bytes():
    """LoRAX #53: memory ran out because a limit on the number of adapters says nothing about their size."""
    world = World(host_budget=1000, device_budget=100, max_slots=100)
    small = [world.load(f"small-{i}", size=1) for i in range(60)]
    for version in small:
        world.end(world.run(version.adapter_id))
    large = world.load("large", size=90)
    world.end(world.run("large"))
    assert world.registry.memory.device_used <= 100 and world.tier(large) is Tier.DEVICE
    assert sum(world.tier(version) is Tier.DEVICE for version in small) == 10


def test_reload_of_the_same_name_reuses_the_prefix_cache_of_the_old_weights(world):
    """vLLM #42125 keys cached blocks by name and path. Here the key is the version, and that is its content's."""
    cache = {world.load("a", "v1"): "blocks of v1"}
    assert world.load("a", "v2") not in cache
    assert world.load("a", "v3") not in cache
    unchanged = world.load("b", "v1")
    cache[unchanged] = "blocks of b"
    assert world.load("b", "v1") in cache, "the same content again throws nothing away"
    world.resolve("b")
    world.registry.fail_version(unchanged, AdapterUnloadedError("copy failed"))
    assert world.load("b", "v1") not in cache, "whose requests are being failed"
    world.registry.release(unchanged)


def test_reload_changes_the_weights_of_running_requests(world):
    """vLLM's `load_inplace` swaps the weights under the same number, also for requests in the middle of their text."""
    world.load("a", "v1")
    running = world.run("a")
    slot = world.record(running).slot
    new = world.load("a", "v2")
    later = world.run("a")
    assert (running.digest, later) == ("v1", new)
    assert world.record(running).slot == slot != world.record(later).slot
    world.registry.deactivate(running)  # preempted; it goes on with what it began with
    assert world.registry.activate(running) == slot
    world.end(running)
    world.end(later)


def test_replacing_needs_an_unload_first_and_requests_fail_meanwhile(world):
    """SGLang answers "already loaded"."""
    world.load("a", "v1")
    ticket = world.registry.loading.begin("a")
    assert world.resolve("a").digest == "v1"
    candidate = world.add_candidate("a", "v2")
    assert world.resolve("a").digest == "v1"
    world.finish("a", "v2", ticket)
    assert world.resolve("a").digest == "v2"
    world.registry.drop_candidate(candidate, world.drain_until)
    assert world.resolve("a").digest == "v2"


def test_id_is_cached_for_the_life_of_the_process(world):
    """LoRAX: what an id once was, it stays."""
    assert [world.load("a", digest).digest for digest in ("v1", "v2", "v1")] == ["v1", "v2", "v1"]
    world.unload("a")
    assert world.load("a", "v4").digest == "v4" and world.resolve("a").digest == "v4"


def test_unload_leaves_the_adapter_in_memory_and_its_slot_taken(world):
    """vLLM #54839: only the name goes."""
    world.load("a")
    world.end(world.run("a"))
    memory = world.registry.memory
    assert (memory.host_used, memory.device_used, len(world.free_slots)) == (10, 10, 3)
    world.unload("a")
    assert world.is_empty()


def test_unload_takes_the_weights_from_under_running_requests(world):
    """vLLM's Rust front end: the next step finds them gone, and reads them from disk."""
    world.load("a")
    running = world.run("a")
    world.unload("a")
    assert world.tier(running) is Tier.DEVICE and not world.registry.wanted
    for name in "bcdefg":  # more than there are slots
        world.load(name)
        world.end(world.run(name))
    assert world.tier(running) is Tier.DEVICE
    world.end(running)


def test_unload_waits_for_ever_for_a_request_that_never_ends(world):
    """SGLang waits until nothing refers to the adapter, without a deadline."""
    version = world.load("a")
    world.run("a")
    world.unload("a")
    assert world.registry.next_deadline() == world.drain_until
    assert world.registry.expire(world.drain_until) == [version]
    with pytest.raises(AdapterUnloadedError):
        world.registry.activate(version)
    world.end(version)
    assert world.is_empty()


def test_unload_that_waits_blocks_every_other_load(world):
    """SGLang holds its one lock for adapters meanwhile."""
    world.load("a", "v1")
    running = world.run("a")
    world.unload("a")
    other, again = world.load("b"), world.load("a", "v2")
    assert world.run("b") == other and world.run("a") == again
    world.unload("b")
    assert world.record(running).slot is not None
    for version in (running, other, again):
        world.end(version)


def test_name_that_is_reused_gets_the_slot_and_weights_of_the_former_adapter(world):
    """SGLang #7426, #7808."""
    world.load("a", "v1")
    old = world.run("a")
    world.unload("a")
    world.load("a", "v2")
    new = world.run("a")
    assert old != new and world.record(old).slot != world.record(new).slot
    world.registry.deactivate(old)
    world.registry.release(old)
    assert world.record(new).slot not in world.free_slots and world.record(new).active == 1
    world.end(new)


def test_failed_load_takes_running_requests_with_it(world):
    """vLLM #13698, LoRAX #14: the server crashes."""
    world.load("a", "v1")
    running = world.run("a")
    world.registry.fail_load("a", world.registry.loading.begin("a"), AdapterInvalidError("half a file"))
    broken = world.load("b")
    world.registry.activate(world.resolve("b"))
    assert world.registry.claim_device(broken, world.now)
    world.registry.abandon_device(broken)
    world.registry.fail_version(broken, AdapterUnloadedError("copy failed"))
    assert world.record(running).slot is not None and world.resolve("a") == running
    with pytest.raises(AdapterUnloadedError):
        world.registry.activate(broken)
    world.registry.release(broken)
    assert broken not in world.registry.records and world.registry.memory.device_used == 10


def test_more_adapters_than_memory_is_an_error():
    """TensorRT-LLM #1552: the cache is full. Here requests wait for their turn, and each gets it."""
    world = World(host_budget=20, device_budget=20, max_slots=2)
    versions = [world.load(f"a{i}") for i in range(12)]
    for version in versions:
        assert world.registry.activate(world.resolve(version.adapter_id)) is None
    waiting = list(versions)
    while waiting:
        world.serve_wishes()
        ready = [version for version in waiting if world.tier(version) is Tier.DEVICE]
        assert ready, "nobody is served any more"
        for version in ready:
            assert world.registry.activate(version) is not None
            world.end(version)
            waiting.remove(version)
    assert not world.registry.wanted


def test_suspended_request_keeps_its_adapter_on_the_device():
    """TensorRT-LLM #18407: adapters stay pinned after suspension, until the cache is full of them."""
    world = World(device_budget=10)
    world.load("a"), world.load("b")
    suspended = world.run("a")
    world.registry.deactivate(suspended)
    assert world.tier(world.run("b")) is Tier.DEVICE
    assert world.tier(suspended) is Tier.HOST
    world.registry.release(suspended)


def test_limit_on_loads_makes_the_server_forget_adapters():
    """vLLM, SGLang: more than `max_cpu_loras` or `max_loaded_loras` cannot be served. The rest is read again."""
    world = World(host_budget=10, device_budget=10, max_slots=1)
    versions = [world.load(f"a{i}") for i in range(50)]
    for version in versions:
        assert world.run(version.adapter_id) == version
        world.end(version)
