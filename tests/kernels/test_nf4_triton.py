"""The Triton kernels over NF4 equal the fp32 reference; in Triton's interpreter here, as compiled on a GPU.

The interpreter can run neither inline PTX nor products of bfloat16: those are for the tests marked `gpu`.
"""

import pytest
import torch
from lorikeet.kernels import overlap
from lorikeet.kernels.nf4 import bitsandbytes_gemm, nf4_linear, nf4_linear_reference, nf4_rows
from lorikeet.kernels.nf4_dispatch import GemmTile

from .nf4_cases import CPU, FORMS, make_weight, relative_error, tensors_of, to_device, worst_row_error

nf4_triton = pytest.importorskip("lorikeet.kernels.nf4_triton", reason="needs Triton")

DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
LLAMA_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
# ||got - want|| / ||want|| of a row. 16 bit: the tables' rounded values (0.0016 on average in bfloat16), then y's.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def gemm(x, weight, bias, tile):
    return nf4_triton.nf4_gemm(x, *tensors_of(weight), weight.out_features, bias, tile)


def check(y, x, weight, bias):
    assert y.dtype == x.dtype and y.shape == (x.shape[0], weight.out_features)
    assert worst_row_error(y, nf4_linear_reference(x, weight, bias)) < TOLERANCES[x.dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("num_rows", "n", "k", "tile"),
    [
        (1, 33, 64, GemmTile(8, 32, 1, 1, 2, "gather")),
        (3, 70, 448, GemmTile(8, 64, 1, 1, 2, "gather")),
        (17, 40, 512, GemmTile(16, 32, 2, 1, 2, "gather")),
        (33, 20, 192, GemmTile(32, 32, 1, 1, 2, "gather")),
        (5, 65, 768, GemmTile(8, 128, 3, 1, 2, "gather")),
        (33, 64, 1024, GemmTile(64, 64, 4, 1, 2, "gather")),
    ],
    ids=str,
)
def test_gemm_equals_the_reference(form, num_rows, n, k, tile):
    torch.manual_seed(num_rows + n)
    weight = make_weight(n, k, form, DEVICE)
    x = torch.randn(num_rows, k, device=DEVICE)
    check(gemm(x, weight, None, tile), x, weight, None)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_splits_bias_and_half_precision(splits):
    """More splits than there are steps of 256 columns, and steps that do not divide among them."""
    torch.manual_seed(splits)
    weight = make_weight(48, 832, "stacked", DEVICE)
    x = torch.randn(9, 832, device=DEVICE, dtype=torch.float16)
    bias = torch.randn(48, device=DEVICE, dtype=torch.float16)
    y = gemm(x, weight, bias, GemmTile(16, 32, splits, 1, 2, "gather"))
    check(y, x, weight, bias)
    again = gemm(x, weight, bias, GemmTile(16, 32, splits, 1, 2, "gather"))
    assert torch.equal(y, again)
    assert not nf4_triton.arrivals(x.device).any()  # left as the next launch needs them


def test_rows_of_x_may_lie_anywhere():
    torch.manual_seed(0)
    weight = make_weight(40, 128, device=DEVICE)
    tile = GemmTile(8, 64, 1, 1, 2, "gather")
    wide = torch.randn(7, 300, device=DEVICE)
    for x in (wide[:, 4:132], wide[:, 3:131], torch.randn(128, 5, device=DEVICE).t()):
        check(gemm(x, weight, None, tile), x, weight, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantized_values_are_those_of_bitsandbytes(form, dtype):
    torch.manual_seed(1)
    weight = make_weight(70, 448, form, DEVICE)
    want = weight.dequantize(dtype)
    for start, stop in ((0, 70), (3, 8), (69, 70)):
        out = torch.full((stop - start, 448), float("nan"), device=DEVICE, dtype=dtype)
        nf4_triton.nf4_dequantize_(out, *tensors_of(weight), start)
        assert torch.equal(out, want[start:stop])


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_are_multiplied_with_pieces_of_the_weight(with_bias, monkeypatch):
    torch.manual_seed(2)
    weight = make_weight(50, 256, "stacked", DEVICE)
    x = torch.randn(20, 256, device=DEVICE)
    bias = torch.randn(50, device=DEVICE) if with_bias else None
    for scratch in (2**25, 256 * 12, 1):
        monkeypatch.setattr(nf4_triton, "_SCRATCH_WEIGHTS", scratch)
        y = nf4_triton.nf4_dequantized_linear(x, *tensors_of(weight), 50, bias)
        torch.testing.assert_close(y, nf4_linear_reference(x, weight, bias), rtol=1e-5, atol=1e-3)


# Every shape of a program and every form of its matrix instruction; each is a compilation.
GPU_TILES = [
    (8, 32, 1, 2),
    (8, 64, 8, 4),
    (8, 128, 1, 4),
    (16, 64, 4, 2),
    (16, 128, 2, 4),
    (32, 128, 4, 4),
    (64, 64, 2, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "splits", "warps"), GPU_TILES)
def test_byte_permutes_on_a_gpu(rows, columns, splits, warps):
    torch.manual_seed(3)
    weight = make_weight(200, 4096, "stacked", DEVICE)
    bias = torch.randn(200, device=DEVICE, dtype=torch.bfloat16)
    tile = GemmTile(rows, columns, splits, warps, 3, "prmt")
    for num_rows in (1, rows - 1, 2 * rows + 3):
        x = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)
        y = gemm(x, weight, bias, tile)
        check(y, x, weight, bias)
        assert torch.equal(y, gemm(x, weight, bias, tile))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "dtype", "k"),
    [
        ("nested", torch.bfloat16, 448),
        ("plain", torch.bfloat16, 448),
        ("stacked", torch.float16, 512),
        ("plain", torch.float16, 512),
    ],
    ids=str,
)
def test_forms_and_odd_widths_on_a_gpu(form, dtype, k):
    """Lookups differ in the instructions and their order only: the same table, the same products."""
    torch.manual_seed(4)
    weight = make_weight(70, k, form, DEVICE)
    x = torch.randn(13, k, device=DEVICE, dtype=dtype)
    by_permutes, by_gather = (gemm(x, weight, None, GemmTile(16, 64, 2, 2, 3, way)) for way in ("prmt", "gather"))
    check(by_permutes, x, weight, None)
    assert relative_error(by_permutes, by_gather) < TOLERANCES[dtype] / 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LLAMA_SHAPES, ids=str)
def test_llama_shapes_in_the_way_that_is_chosen(shape):
    torch.manual_seed(4)
    weight = make_weight(*shape, "stacked", DEVICE)
    for num_rows in (1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 200, 256, 300, 1024):
        x = torch.randn(num_rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
        y = nf4_linear(x, weight)
        check(y, x, weight, None)
        assert torch.equal(y, nf4_linear(x, weight)), num_rows


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["nested", "plain"])
@pytest.mark.parametrize("num_rows", [1, 5, 16, 40, 130])
def test_as_close_to_the_reference_as_bitsandbytes(form, num_rows):
    torch.manual_seed(5)
    weight = make_weight(4096, 4096, form, DEVICE)
    x = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(4096, device=DEVICE, dtype=torch.bfloat16)
    want = nf4_linear_reference(x, weight, bias)
    theirs = relative_error(bitsandbytes_gemm(x, *tensors_of(weight), 4096, bias), want)
    assert relative_error(nf4_linear(x, weight, bias), want) < max(2 * theirs, TOLERANCES[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_rows_on_a_gpu_are_those_of_the_cpu(form):
    weight = make_weight(70, 1024, form)
    on_gpu = to_device(weight, torch.device("cuda"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(nf4_rows(on_gpu, 3, 69, dtype).cpu(), nf4_rows(weight, 3, 69, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 16, 64, 300])
def test_captured_and_replayed_with_other_inputs(num_rows):
    torch.manual_seed(6)
    weights = [make_weight(4096, 4096, "stacked", DEVICE), make_weight(6144, 4096, "nested", DEVICE)]
    x = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)

    def run():
        return [nf4_linear(x, weight) for weight in weights]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), overlap.rehearsal():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for y, eager in zip(outputs, run(), strict=True):
            assert torch.equal(y, eager)
