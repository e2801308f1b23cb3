"""Loader threads give their core back between pieces of work, and only those that nobody waits for."""

import math
import random
import threading

import pytest
import torch
from lorikeet.adapters import device_store, finite, priority, weights_file
from lorikeet.adapters.background import start_pool
from lorikeet.adapters.finite import all_finite, largest_magnitude
from lorikeet.adapters.priority import give_way, idle_priority, low_priority, normal_priority
from lorikeet.adapters.state.durable_files import write_durably
from lorikeet.adapters.weights_file import new_digest, read_header, read_payload
from safetensors.torch import save_file


@pytest.fixture
def yields(monkeypatch):
    """A list that grows by the name of a thread whenever it yields."""
    found = []
    monkeypatch.setattr(priority, "_sched_yield", lambda: found.append(threading.current_thread().name))
    return found


def on_thread(set_priority, work):
    with start_pool(1, "loader", set_priority) as pool:
        return pool.submit(work).result(60)


@pytest.mark.parametrize("set_priority", [idle_priority, low_priority, normal_priority])
def test_only_threads_of_idle_priority_give_way(yields, set_priority):
    on_thread(set_priority, give_way)
    assert yields == (["loader_0"] if set_priority is idle_priority else [])


def test_yielding_returns_where_nobody_waits():
    priority.yield_core()


def test_a_file_is_read_and_written_in_turns(yields, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "READ_BYTES", 1000)
    monkeypatch.setattr("lorikeet.adapters.state.durable_files._WRITE_BYTES", 700)
    path, copy = tmp_path / "weights", tmp_path / "copy"
    save_file({"a": torch.randn(1111)}, path)

    def read():
        with path.open("rb", buffering=0) as file:
            payload = read_payload(file, read_header(file), new_digest())
        num_yields = len(yields)
        write_durably(copy, [payload, payload[:100]])
        return bytes(payload), num_yields

    payload, num_yields = on_thread(idle_priority, read)
    assert payload == path.read_bytes()[-4444:] and num_yields == math.ceil(4444 / 1000)
    assert copy.read_bytes() == payload + payload[:100] and len(yields) - num_yields == math.ceil(4444 / 700) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_found_in_any_piece(yields, monkeypatch, dtype):
    monkeypatch.setattr(finite, "_PIECE", 100)
    values = torch.randn(370).to(dtype)
    assert on_thread(idle_priority, lambda: largest_magnitude(values)) == values.abs().max().item()
    assert len(yields) == 4
    for _ in range(20):
        for special in (math.nan, math.inf, -math.inf, -9.0, 9.0):
            place = random.randrange(370)
            changed = values.clone()
            changed[place] = special
            found = largest_magnitude(changed)
            assert math.isnan(found) if math.isnan(special) else found == abs(special)
            assert all_finite(changed) == math.isfinite(special)
    values[[3, 350]] = torch.tensor([math.inf, math.nan]).to(dtype)
    assert math.isnan(largest_magnitude(values)) and largest_magnitude(values[:300]) == math.inf


@pytest.mark.parametrize("count", [1, 99, 100, 101, 1234])
def test_a_copy_on_the_cpu_is_made_in_turns(yields, monkeypatch, count):
    monkeypatch.setattr(device_store, "_TURN", 100)
    source, target = torch.randn(count), torch.zeros(count + 7)
    device_store._copy_in_turns(source, target[3 : 3 + count])
    assert torch.equal(target[3 : 3 + count], source) and not target[:3].any() and not target[3 + count :].any()
    assert len(yields) == math.ceil(count / 100)
