"""Device memory: what is installed can be read back, slots carry nothing over, compaction changes no delta."""

import random

import pytest
import torch
from lorikeet.adapters import device_store
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.packing import PackedAdapter, pack_adapter
from lorikeet.adapters.report import AdapterReport
from peft import LoraConfig

CPU = torch.device("cpu")
REPORT = AdapterReport("LoRA", "", 1, 1, {})


@pytest.fixture
def make_packed(sites):
    """make_packed(seed, modules=4): a random adapter, packed by hand; ranks of 0 to 5."""

    def make(seed, share=0.6):
        rng = random.Random(seed)
        offsets = torch.full((len(sites.sites),), -1, dtype=torch.int64)
        ranks = torch.zeros((len(sites.sites), sites.max_slices), dtype=torch.int32)
        end = 0
        for site in sites.sites:
            chosen = [rng.randint(0, 5) if rng.random() < share else 0 for _ in site.slices]
            if sum(chosen):
                offsets[site.index] = end
                ranks[site.index, : len(chosen)] = torch.tensor(chosen)
                end += sum(r * (site.in_features + p.out_features) for r, p in zip(chosen, site.slices, strict=True))
        data = torch.randn(end, generator=torch.Generator().manual_seed(seed))
        return PackedAdapter(data, offsets, ranks, REPORT)

    return make


def read_back(store, packed, slot, unpack):
    """Deltas of a slot, found through the device tables alone."""
    tables = PackedAdapter(store.arena, store.site_offsets[:, slot], store.site_ranks[:, slot], REPORT)
    return unpack(tables, data=store.arena)


def assert_same_deltas(got, expected):
    assert got.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(got[module], delta, rtol=0, atol=0)


def test_installed_adapter_is_found_through_the_tables(sites, make_packed, unpack):
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 4)
    packs = [make_packed(seed) for seed in range(3)]
    slots = [store.install(packed) for packed in packs]
    assert len(set(slots)) == 3
    for packed, slot in zip(packs, slots, strict=True):
        assert_same_deltas(read_back(store, packed, slot, unpack), unpack(packed))
        assert store.rank_sums[slot].tolist() == packed.site_ranks.sum(1).tolist()
    store.check_integrity()


def test_reused_slot_has_nothing_of_the_adapter_before(sites, make_packed, unpack):
    """SGLang #7426: a module that the new adapter lacks must not keep the old one's weights."""
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 1)
    everything, little = make_packed(1, share=1.0), make_packed(2, share=0.1)
    store.remove(store.install(everything))
    slot = store.install(little)
    assert_same_deltas(read_back(store, little, slot, unpack), unpack(little))
    assert (store.site_offsets[:, slot] >= 0).tolist() == (little.site_offsets >= 0).tolist()
    assert store.site_ranks[:, slot].tolist() == little.site_ranks.tolist()


def test_memory_is_counted_in_bytes_and_freed(sites, make_packed):
    packed = make_packed(3)
    store = DeviceStore(sites, torch.float32, CPU, 2 * 4 * (packed.data.numel() + 64), 100)
    first, second = store.install(packed), store.install(packed)
    assert store.install(packed) is None
    assert store.used_bytes == 2 * store.extent_bytes(packed) <= store.capacity_bytes
    store.remove(first)
    assert store.install(packed) is not None
    store.remove(second)
    with pytest.raises(KeyError):
        store.remove(second)
    store.check_integrity()


def test_no_slot_left_is_no_room(sites, make_packed):
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 2)
    assert [store.install(make_packed(i)) is None for i in range(3)] == [False, False, True]


def test_adapter_without_any_element_takes_a_slot(sites, make_packed):
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 2)
    slot = store.install(make_packed(0, share=0.0))
    assert slot is not None and store.rank_sums[slot].sum() == 0


@pytest.mark.parametrize("buffer_bytes", [256, 4096, 2**23], ids=lambda n: f"buffer_{n}")
@pytest.mark.parametrize("seed", range(4))
def test_compaction_changes_no_delta(seed, buffer_bytes, sites, make_packed, unpack, monkeypatch):
    """Random installs and removals; small buffers make extents overlap their targets in many chunks."""
    monkeypatch.setattr(device_store, "MOVE_BUFFER_BYTES", buffer_bytes)
    rng = random.Random(seed)
    store = DeviceStore(sites, torch.float32, CPU, 200_000, 16)
    held = {}
    for i in range(40):
        if held and rng.random() < 0.4:
            slot = rng.choice(sorted(held))
            store.remove(slot)
            del held[slot]
        packed = make_packed(seed * 100 + i, share=rng.choice([0.1, 0.5, 1.0]))
        slot = store.install(packed)
        if slot is not None:
            held[slot] = packed
        if i % 10 == 9:
            store.compact()
            store.check_integrity()
            for slot, packed in held.items():
                assert_same_deltas(read_back(store, packed, slot, unpack), unpack(packed))
    assert store.compact() == 0


def test_compaction_makes_room_for_an_adapter_that_did_not_fit(sites, make_packed):
    big, small = make_packed(5, share=1.0), make_packed(6, share=0.2)
    store = DeviceStore(sites, torch.float32, CPU, 4 * 3 * (big.data.numel() + 64), 8)
    slots = [store.install(p) for p in (big, small, big)]
    store.remove(slots[0])
    store.remove(slots[2])
    larger = PackedAdapter(torch.zeros(2 * big.data.numel()), big.site_offsets, big.site_ranks, REPORT)
    assert store.install(larger) is None
    assert store.compact() == 1
    assert store.install(larger) is not None


def test_peft_adapter_survives_the_way_to_the_device(tmp_path, save_adapter, sites, base, unpack):
    expected = save_adapter(LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM"), tmp_path)
    packed = pack_adapter(load_checkpoint(tmp_path, sites, base), sites, dtype=torch.float32, pin_memory=False)
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 2)
    got = read_back(store, packed, store.install(packed), unpack)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
