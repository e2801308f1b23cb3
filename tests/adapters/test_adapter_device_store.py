"""Device memory: what is installed can be read back, slots carry nothing over, compaction changes nothing."""

import dataclasses
import math
import random

import pytest
import torch
from lorikeet.adapters import device_store
from lorikeet.adapters.arena import ALIGNMENT
from lorikeet.adapters.checkpoint import load_checkpoint
from lorikeet.adapters.device_store import DeviceStore
from lorikeet.adapters.packing import REGION_ALIGNMENT, OverrideKind, pack_adapter
from lorikeet.adapters.tensor_plan import TensorPlanner
from peft import LoraConfig

from .hand_made import HandMade

CPU = torch.device("cpu")


@pytest.fixture
def make_packed(sites):
    """make_packed(seed, share=0.6): a random adapter; ranks of 0 to 5, affines and weights of its own."""

    def make(seed, share=0.6):
        rng = random.Random(seed)
        adapter = HandMade(sites, seed)
        for module, (site, index) in sites.by_module.items():
            if rng.random() < share:
                adapter.lora(rng.randint(1, 5), module)
            if rng.random() < share / 4:
                adapter.affine(module)
            if rng.random() < share / 8:
                out_features = site.slices[index].out_features
                adapter.weight(module, weight=adapter.randn(out_features, site.in_features))
        return adapter.pack()

    return make


def read_back(store, packed, slot, unpack):
    """Deltas, affines and weights of a slot, found through the device tables alone."""
    tables = dataclasses.replace(
        packed, site_offsets=store.site_offsets[:, slot], site_ranks=store.site_ranks[:, slot], overrides=()
    )
    found = unpack(tables, data=store.arena)
    for site, start in zip(store.site_table.sites, store.site_affines[:, slot].tolist(), strict=True):
        if start >= 0:
            found[f"{site.name} affine"] = store.arena[start : start + 2 * site.out_features]
    for override in store.overrides.get(slot, ()):
        for name, region in override.regions.items():
            found[f"{override.module} {name}"] = store.override_tensor(slot, region)
    return found


def contents(packed, unpack, sites):
    """The same, from the adapter as it was packed."""
    found = unpack(packed)
    for site, start in zip(sites.sites, packed.site_affines.tolist(), strict=True):
        if start >= 0:
            found[f"{site.name} affine"] = packed.data[start : start + 2 * site.out_features]
    for override in packed.overrides:
        for name, (start, shape) in override.regions.items():
            found[f"{override.module} {name}"] = packed.data[start : start + math.prod(shape)].view(shape)
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


def test_installed_adapter_is_found_through_the_tables(sites, make_packed, unpack):
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 4)
    packs = [make_packed(seed) for seed in range(3)]
    slots = [store.install(packed) for packed in packs]
    assert len(set(slots)) == 3
    for packed, slot in zip(packs, slots, strict=True):
        assert_same(read_back(store, packed, slot, unpack), contents(packed, unpack, sites))
        assert store.rank_sums[slot].tolist() == packed.site_ranks.sum(1).tolist()
        assert store.has_affine[slot].tolist() == (packed.site_affines >= 0).tolist()
    store.check_integrity()


def test_reused_slot_has_nothing_of_the_adapter_before(sites, make_packed, unpack):
    """SGLang #7426: a module that the new adapter lacks must not keep the old one's weights."""
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 1)
    everything, little = make_packed(1, share=1.0), make_packed(2, share=0.1)
    store.remove(store.install(everything))
    slot = store.install(little)
    assert_same(read_back(store, little, slot, unpack), contents(little, unpack, sites))
    assert (store.site_offsets[:, slot] >= 0).tolist() == (little.site_offsets >= 0).tolist()
    assert store.site_ranks[:, slot].tolist() == little.site_ranks.tolist()
    nothing = store.install(everything)
    assert nothing is None
    store.remove(slot)
    slot = store.install(HandMade(sites, 0).pack())
    assert not store.has_affine[slot].any() and (store.site_affines[:, slot] == -1).all()
    assert not store.affine_slots and not store.overrides and not store.vocab_sizes


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
def test_compaction_changes_nothing(seed, buffer_bytes, sites, make_packed, unpack, monkeypatch):
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
                assert_same(read_back(store, packed, slot, unpack), contents(packed, unpack, sites))
    assert store.compact() == 0


def test_regions_stay_aligned_wherever_their_extent_moves(sites):
    """Matmuls read them directly: cuBLAS wants 16 bytes."""
    assert ALIGNMENT % REGION_ALIGNMENT == 0
    module = next(iter(sites.by_module))
    adapter = HandMade(sites, 0).lora(1, module)
    adapter.weight(module, bias=torch.randn(3), weight=torch.randn(5, 7))
    packed = adapter.pack()
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 3)
    slots = [store.install(HandMade(sites, 1).lora(3, module).pack()), store.install(packed)]
    for _ in range(2):
        for region in packed.overrides[0].regions.values():
            tensor = store.override_tensor(slots[1], region)
            assert (tensor.storage_offset() % REGION_ALIGNMENT, tensor.shape) == (0, region.shape)
        if slots[0] is not None:
            store.remove(slots[0])
            assert store.compact() == 1
            slots[0] = None


def test_vocabulary_and_token_ids_are_known_while_the_adapter_is_there(sites):
    adapter = HandMade(sites, 0).token_rows([9, 4, 70], 8, "model.embed_tokens")
    adapter.vocab_size = 71
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 3)
    slot = store.install(adapter.pack())
    (override,) = store.overrides[slot]
    assert override.kind is OverrideKind.TOKENS and override.token_ids.tolist() == [4, 9, 70]
    assert store.vocab_sizes == {slot: 71}
    store.check_integrity()
    store.remove(slot)
    assert not store.overrides and not store.vocab_sizes


def test_compaction_makes_room_for_an_adapter_that_did_not_fit(sites, make_packed):
    big, small = make_packed(5, share=1.0), make_packed(6, share=0.2)
    store = DeviceStore(sites, torch.float32, CPU, 4 * 3 * (big.data.numel() + 64), 8)
    slots = [store.install(p) for p in (big, small, big)]
    store.remove(slots[0])
    store.remove(slots[2])
    larger = dataclasses.replace(big, data=torch.zeros(2 * big.data.numel()))
    assert store.install(larger) is None
    assert store.compact() == 1
    assert store.install(larger) is not None


def test_peft_adapter_survives_the_way_to_the_device(tmp_path, save_adapter, sites, modules, weights, base, unpack):
    expected = save_adapter(LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM"), tmp_path)
    checkpoint = load_checkpoint(tmp_path, TensorPlanner(sites, modules, base))
    packed = pack_adapter(checkpoint, weights, dtype=torch.float32, pin_memory=False)
    store = DeviceStore(sites, torch.float32, CPU, 2**20, 2)
    got = read_back(store, packed, store.install(packed), unpack)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
