"""NF4 weights and their operators: bitsandbytes' values in every form, refusals, and the choice of a way."""

import bitsandbytes.functional as bnb
import pytest
import torch
from lorikeet.kernels import nf4_dispatch
from lorikeet.kernels.nf4 import nf4_linear, nf4_linear_reference, nf4_rows, prepare_for_device
from lorikeet.kernels.nf4_dispatch import ROW_BUCKETS, GemmTile, choose_way
from lorikeet.kernels.nf4_quantize import quantize_nf4, read_absmax
from lorikeet.kernels.nf4_weight import NestedAbsmax, NF4Weight, plain_absmax, stack_absmax

from .nf4_cases import FORMS, make_weight, tensors_of

H100 = ((9, 0), 132)


def oracle(weight):
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return packed, state, bnb.dequantize_4bit(packed, state).float()


@pytest.mark.parametrize("shape", [(64, 256), (33, 64), (300, 192)], ids=str)
def test_nested_constants_give_bitsandbytes_values(shape):
    source = torch.randn(shape)
    packed, state, want = oracle(source)
    codes, absmax = quantize_nf4(source)
    assert torch.equal(codes, packed.view(-1))
    assert torch.equal(NF4Weight(codes, absmax, *shape).dequantize(torch.float32), want)
    read = read_absmax(state)
    assert isinstance(read, NestedAbsmax)
    assert torch.equal(NF4Weight(codes, read, *shape).dequantize(torch.float32), want)


@pytest.mark.parametrize(
    ("sizes", "nested"), [((64, 128, 64), True), ((128, 64, 33), True), ((64, 33, 128), False), ((33,), True)], ids=str
)
def test_stacked_parts_keep_their_values(sizes, nested):
    """Rows of 4 constants: parts of a multiple of 64 rows fill groups of 256; only the last need not."""
    sources = [torch.randn(size, 256) * (1 + 3 * i) for i, size in enumerate(sizes)]
    codes, absmax = zip(*(quantize_nf4(source) for source in sources), strict=True)
    stacked = stack_absmax(absmax)
    assert isinstance(stacked, NestedAbsmax) == nested
    weight = NF4Weight(torch.cat(codes), stacked, sum(sizes), 256)
    want = torch.cat([oracle(source)[2] for source in sources])
    assert torch.equal(weight.dequantize(torch.float32), want)
    assert torch.equal(nf4_rows(weight, 31, sum(sizes)), want[31:])


def test_constants_of_other_kinds_are_un_nested():
    packed, state, want = oracle(torch.randn(64, 256))
    plain = read_absmax(bnb.QuantState(absmax=plain_absmax(read_absmax(state)), blocksize=64))
    assert isinstance(plain, torch.Tensor)
    state.state2.blocksize = 512  # not QLoRA's
    state.state2.absmax = state.state2.absmax[:1]
    assert isinstance(read_absmax(state), torch.Tensor)
    other_map = read_absmax(oracle(torch.randn(64, 256))[1])
    other_map.code_map[3] += 1
    nested = read_absmax(oracle(torch.randn(64, 256))[1])
    for parts in ((nested, plain), (nested, other_map)):
        assert torch.equal(stack_absmax(parts), torch.cat([plain_absmax(part) for part in parts]))
    assert torch.equal(NF4Weight(packed.view(-1), plain, 64, 256).dequantize(torch.float32), want)


def test_nested_constants_take_an_eighth_of_a_bit():
    weight = make_weight(256, 4096)
    bits = 8 * weight.nbytes / (256 * 4096)
    assert 4.125 < bits < 4.14
    assert 8 * make_weight(256, 4096, "plain").nbytes / (256 * 4096) == 4.5


@pytest.mark.parametrize("form", FORMS)
def test_operators_on_the_cpu(form):
    weight = make_weight(70, 256, form)
    x, bias = torch.randn(5, 256), torch.randn(70)
    one_offset = form != "stacked"
    args = (x, *tensors_of(weight), 70, one_offset, bias)
    want = nf4_linear_reference(x, weight, bias)
    torch.testing.assert_close(torch.ops.lorikeet.nf4_linear(*args), want, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(nf4_linear(x, weight, bias), want, rtol=1e-5, atol=1e-3)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.ops.lorikeet.nf4_dequantize(*tensors_of(weight), 256, 3, 60, dtype)
        assert torch.equal(rows, weight.dequantize(dtype)[3:63])
    torch.library.opcheck(torch.ops.lorikeet.nf4_linear.default, args)
    torch.library.opcheck(torch.ops.lorikeet.nf4_dequantize.default, (*tensors_of(weight), 256, 3, 60, torch.float16))


def test_broken_contracts_are_named():
    weight = make_weight(64, 256)
    codes, absmax, code_map, scales, offsets = tensors_of(weight)
    x = torch.randn(2, 256)

    def refused(*args: object, words: str) -> None:
        with pytest.raises(RuntimeError, match=words):
            torch.ops.lorikeet.nf4_linear(*args)

    refused(x[:, :100].contiguous(), *tensors_of(weight), 64, True, words="in_features")
    refused(x, codes[:-1], absmax, code_map, scales, offsets, 64, True, words="absmax|codes")
    refused(x, codes.view(torch.int8), absmax, code_map, scales, offsets, 64, True, words="codes")
    refused(x, codes, absmax.float(), code_map, scales, offsets, 64, True, words="absmax")
    refused(x, codes, absmax, code_map, scales, None, 64, True, words="together")
    refused(x, codes, absmax, code_map, scales[:0], offsets, 64, True, words="scales")
    refused(x, *tensors_of(weight), 65, True, words="bytes")
    refused(x, *tensors_of(weight), 64, True, torch.randn(63), words="bias")


def test_every_row_count_has_a_way_that_fits():
    for n, k in ((6144, 4096), (4096, 14336), (576, 576), (192, 64), (28672, 4096)):
        for num_rows in (1, 2, 8, 9, 16, 17, 64, 65, 256):
            way = choose_way(*H100, num_rows, n, k, one_offset=False, half_precision=True)
            assert isinstance(way, GemmTile)
            assert way.rows in (8, 16, 32, 64) and (way.rows >= num_rows or way.rows == 64)
            assert way.splits == 1 or way.splits * 512 <= k
        assert choose_way(*H100, 257, n, k, one_offset=True, half_precision=True) == "dequantize"
        assert choose_way(*H100, 1, n, k, one_offset=True, half_precision=False) == "dequantize"
    assert choose_way((7, 5), 40, 1, 4096, 4096, one_offset=True, half_precision=True) == "dequantize"


def test_measured_ways_go_to_the_nearest_shape(monkeypatch):
    tile = GemmTile(8, 64, 8, 4, 4)
    ways = (tile, "bitsandbytes", *["dequantize"] * (len(ROW_BUCKETS) - 2))
    monkeypatch.setattr(nf4_dispatch, "MEASURED", {(9, 0): {(4096, 4096): ways}})
    choose_way.cache_clear()
    try:
        assert choose_way(*H100, 1, 4096, 4096, True, True) == tile
        assert choose_way(*H100, 1, 4096, 3072, True, True) == tile._replace(splits=6)
        assert choose_way(*H100, 2, 4096, 4096, True, True) == "bitsandbytes"
        # A stack's offsets don't fit bitsandbytes, and a much larger weight is another case.
        assert isinstance(choose_way(*H100, 2, 4096, 4096, False, True), GemmTile)
        assert choose_way(*H100, 1, 28672, 4096, True, True) != tile
        assert choose_way((8, 0), 108, 1, 4096, 4096, True, True) != tile
    finally:
        choose_way.cache_clear()


def test_weights_for_the_cpu_have_plain_constants():
    weight = make_weight(33, 256)
    prepared = prepare_for_device(weight, torch.float32)
    assert isinstance(prepared.absmax, torch.Tensor)
    assert torch.equal(prepared.dequantize(torch.float32), weight.dequantize(torch.float32))
