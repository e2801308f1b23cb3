"""benchmarks/nf4_kernels.py without a GPU: the table that it prints is the one that the dispatch takes."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from lorikeet.kernels import nf4_dispatch
from lorikeet.kernels.nf4_dispatch import ROW_BUCKETS, GemmTile, choose_way
from lorikeet.kernels.nf4_weight import NestedAbsmax, NF4Weight

from .scripts import BENCHMARKS

TIMING = {"median_us": 5.0, "low_us": 4.0, "high_us": 6.0}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    pytest.importorskip("triton")
    yield importlib.import_module("nf4_kernels")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_printed_table_can_be_pasted(script, monkeypatch):
    tile = GemmTile(8, 64, 8, 4, 4)
    ways = [tile, "bitsandbytes", None, *["dequantize"] * (len(ROW_BUCKETS) - 3)]
    lines = script.as_source((9, 0), {(4096, 4096): ways})
    names = {"GemmTile": GemmTile}
    exec("\n".join(lines), names)
    assert names["MEASURED"] == {(9, 0): {(4096, 4096): tuple(ways)}}
    assert all(len(line) <= 120 for line in lines)
    monkeypatch.setattr(nf4_dispatch, "MEASURED", names["MEASURED"])
    choose_way.cache_clear()
    assert choose_way((9, 0), 132, 1, 4096, 4096, True, True) == tile
    assert isinstance(choose_way((9, 0), 132, 16, 4096, 4096, True, True), GemmTile)
    choose_way.cache_clear()


def test_candidates_fill_the_card_and_fit_the_weight(script):
    bench = script.Bench.__new__(script.Bench)
    bench.capability, bench.num_multiprocessors = (9, 0), 132
    compiled = set()
    for shape in script.SHAPES.values():
        for num_rows in script.TUNED:
            tiles = bench.first_tiles(shape, num_rows)
            assert len(tiles) >= 2 and len(set(tiles)) == len(tiles)
            for tile in tiles:
                assert tile.splits * 512 <= shape[1] or tile.splits == 1
                assert tile.rows >= num_rows or tile.rows == 64
            compiled |= set(tiles)
            assert all(other.rows == tiles[0].rows for other in script.refine(tiles[0]))
    assert len(compiled) < 100  # each is a compilation of about three seconds


def test_flow_on_a_cpu(script, monkeypatch):
    """Tuning, comparison and report with the host's clock for the device's, and a tile that computes nonsense."""

    class OnHost:
        def __init__(self, runs):
            self.runs = runs

        def sample(self, repeats, *, flush):
            assert flush is None
            return [float(len(self.runs)) + i for i in range(repeats)]

    def ours(x, weight, out_features, tile):
        if tile.lookup == "gather":
            return x.new_zeros(x.shape[0], out_features)
        return theirs(x, *weight, out_features, None)

    def theirs(x, codes, absmax, code_map, scales, offsets, out_features, bias):
        nested = NestedAbsmax(absmax, code_map, scales, offsets, one_offset=True)
        return F.linear(x, NF4Weight(codes, nested, out_features, x.shape[1]).dequantize(x.dtype), bias)

    shapes = {"qkv": (384, 512), "o": (256, 1024)}
    compiled = []
    for name, value in {
        "DEVICE": "cpu", "SHAPES": shapes, "ROWS": (1, 2, 16, 17), "TUNED": (16, 1), "rotating": OnHost, "ours": ours,
        "bitsandbytes_gemm": theirs, "compile_tiles": lambda tiles, *_: compiled.extend(tiles), "_COPIES_BYTES": 10**6,
    }.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.nf4_triton, "nf4_dequantized_linear", theirs)
    monkeypatch.setattr(script.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(script.torch.cuda, "synchronize", lambda: None)
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(script.torch.cuda, "get_device_properties", lambda _: card)
    found = script.measure_nf4(60.0, 3e12)
    assert [(row["site"], row["rows"]) for row in found["rows"]] == [(s, m) for s in shapes for m in (1, 2, 16, 17)]
    for row in found["rows"]:
        assert {"bitsandbytes", "dequantize", "bf16"} < row["each"].keys() and row["fraction_of_copy"] > 0
    assert found["failed"] and all("gather" in name and "wrong" in why for name, why in found["failed"].items())
    assert compiled and "GemmTile" in "\n".join(found["table"])
    assert script.as_text(found).count("qkv") >= 4


def test_report_names_what_failed(script):
    row = {
        "site": "o",
        "shape": (4096, 4096),
        "rows": 1,
        "way": str(GemmTile(8, 64, 8, 4, 4)),
        "us": TIMING,
        "bytes": 10**7,
        "fraction_of_copy": 0.5,
        "each": {"bf16": TIMING},
    }
    text = script.as_text({"rows": [row], "failed": {"o 1 x": "wrong by 0.5"}, "table": ["MEASURED = {"]})
    assert "wrong by 0.5" in text and "MEASURED" in text and "nan" in text
