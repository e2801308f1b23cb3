"""The layers of a Llama-like decoder on a CPU, all of them in one call of the native library.

`native/decoder.cpp` calls what the operators call (norm, NF4 linear, LoRA, rotation, attention, activation), in the
order and with the arguments of `server/base/lean_decoder.py`, so results are the same to the bit. What is saved is what
Python does around each of them: 9 calls a layer, 13 with adapters.

There is no second implementation: where there is no library the operators are called one by one.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .attention import check_paged_attention
from .attention_cpu import LANES
from .contract import check
from .decoder_parts import StackAdapters, StackLayer, StackLinear, StackPaging
from .native.functions import ADDRESS, TYPE_NUMBERS, function
from .nf4_tiles import TILE, Layout
from .nf4_weight import BLOCK
from .rope import check_rotation

_RUN_LAYERS: Final = ("lorikeet_decoder_layers", ADDRESS)
_run_layers = function(*_RUN_LAYERS)


class _Linear(ctypes.Structure):
    """`Linear` in native/decoder.cpp; the next ones likewise."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "constants", "bias", "lora", "arena", "affines")),
        *((name, ctypes.c_int64) for name in ("out_features", "in_features", "site")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "head_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        ("scale", ctypes.c_double),
        ("window", ctypes.c_int64),
    )


class _Affines(ctypes.Structure):
    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("has", ctypes.c_char_p),
        ("num_segments", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "type", "in_pairs", "hidden_width")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("hidden", "out", "space", "wide", "rotations", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("kv_slots", "query_starts", "context_lens", "block_tables")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_sequences", "max_blocks", "num_blocks", "block_size")),
        ("rows", ctypes.c_void_p),
        ("is_adapted", ctypes.c_char_p),
        ("affines", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_affines", "threads")),
    )


def is_available() -> bool:
    """Whether there is a native library; nothing else of this module is to be used without."""
    return _run_layers is not None


class DecoderStack:
    """The layers of one model, for one thread. Tensors are kept and not copied: what is written to them later counts.

    Args:
        layers: in order, at least one.
        num_heads, num_kv_heads, head_dim: of every layer; head_dim is a multiple of 8.
        eps: of every norm.
        dtype: of activations: float32, bfloat16 or float16.

    Raises:
        RuntimeError: a tensor breaks the contract of `decoder_parts`.
    """

    def __init__(
        self,
        layers: Sequence[StackLayer],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        check(head_dim % LANES == 0, lambda: f"head_dim must be a multiple of {LANES}, got {head_dim}")
        self._dtype = dtype
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._query_width, self._qkv_width = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
        self._hidden_width, self._mlp_width = layers[0].qkv.weight.in_features, layers[0].down.weight.in_features
        self._head_norm = layers[0].head_norm
        self._layout = layers[0].qkv.weight.layout
        check(
            self._layout is Layout.TILES or (self._layout is Layout.PAIRS and dtype is torch.bfloat16),
            lambda: f"weights must be in tiles, or with bfloat16 in pairs, got {self._layout.value} with {dtype}",
        )
        self._kept: list[Any] = [layers]  # whatever the tables point to
        sites = [linear.lora for layer in layers for linear in layer.linears if linear.lora is not None]
        self._num_slots = min((site.num_slots for site in sites), default=0)
        self._num_sites = 1 + max(linear.site for layer in layers for linear in layer.linears)
        # Before or after a linear its input and output are there in fp32, too, where its kernel takes no other type.
        self._widest = max(
            linear.weight.in_features + linear.weight.out_features for layer in layers for linear in layer.linears
        )
        tables = (_Layer * len(layers))(*(self._describe(layer) for layer in layers))
        self._kept.append(tables)
        self._step = _Step(
            layers=ctypes.addressof(tables),
            num_layers=len(layers),
            type=TYPE_NUMBERS[dtype],
            in_pairs=self._layout is Layout.PAIRS,
            hidden_width=self._hidden_width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            eps=eps,
        )

    def run(self, hidden: Tensor, rotations: Tensor, paging: StackPaging, adapters: StackAdapters | None) -> Tensor:
        """Runs all layers.

        Args:
            hidden: [num_rows, hidden], contiguous, of the stack's dtype. Becomes what the result is to be added to.
            rotations: of the rows, see `rope.rope_kv_write_`.
            paging: of the step. The cache's entries of its rows are written.
            adapters: of the step; None: there is no adapted row.

        Returns:
            What the MLP of the last layer came to, as `hidden`.

        Raises:
            RuntimeError: a tensor breaks this contract.
        """
        num_rows, step = len(hidden), self._step
        check(
            hidden.dtype is self._dtype
            and hidden.is_cpu
            and hidden.shape == (num_rows, self._hidden_width)
            and hidden.is_contiguous(),
            lambda: (
                f"hidden must be {self._dtype} [num_rows, {self._hidden_width}], contiguous, on the CPU,"
                f" got {hidden.dtype} {list(hidden.shape)} on {hidden.device}"
            ),
        )
        out = torch.empty_like(hidden)
        # Attention's tensors and the MLP's take turns.
        shared = max(self._qkv_width + self._query_width, 3 * self._mlp_width)
        space = hidden.new_empty(num_rows * (self._hidden_width + shared))
        wide = None
        if self._dtype is not torch.float32 and self._layout is Layout.TILES:
            wide = torch.empty(num_rows * self._widest, dtype=torch.float32)
        self._check_paging(space, rotations, paging, num_rows)
        step.num_rows, step.threads = num_rows, torch.get_num_threads()
        step.hidden, step.out, step.space = hidden.data_ptr(), out.data_ptr(), space.data_ptr()
        step.wide = None if wide is None else wide.data_ptr()
        step.rotations, step.kv_slots = rotations.data_ptr(), paging.kv_slots.data_ptr()
        step.keys, step.values = map(ctypes.addressof, (paging.caches.key_table, paging.caches.value_table))
        step.query_starts, step.context_lens = paging.query_starts.data_ptr(), paging.context_lens.data_ptr()
        step.block_tables = paging.block_tables.data_ptr()
        step.num_sequences, step.max_blocks = paging.block_tables.shape
        _, step.num_blocks, step.block_size, _ = paging.caches.keys[0].shape
        affines = self._describe_adapters(adapters, num_rows)
        assert _run_layers is not None
        _run_layers(ctypes.addressof(step))
        del affines  # until here the step pointed to it
        return out

    def _check_paging(self, space: Tensor, rotations: Tensor, paging: StackPaging, num_rows: int) -> None:
        """By the checks of the operators, for the first layer; caches and norms of the others are like its."""
        num_heads, _, head_dim = self._heads
        keys, values = paging.caches.keys[0], paging.caches.values[0]
        check(
            len(paging.caches.keys) == self._step.num_layers,
            lambda: f"caches must be of {self._step.num_layers} layers, got {len(paging.caches.keys)}",
        )
        qkv = space.as_strided((num_rows, self._qkv_width), (self._qkv_width, 1))
        queries = space.as_strided((num_rows, num_heads, head_dim), (self._qkv_width, head_dim, 1))
        check_rotation(qkv, rotations, keys, values, paging.kv_slots, self._head_norm)
        step = (paging.query_starts, paging.context_lens, paging.block_tables)
        check_paged_attention(queries, keys, values, *step, 0, 0.0)

    def _describe_adapters(self, adapters: StackAdapters | None, num_rows: int) -> Any:
        """Put them into the step's table; what has to live as long as that."""
        step = self._step
        step.rows, step.is_adapted, step.affines, step.num_affines = None, None, None, 0
        if adapters is None:
            return None
        rows = adapters.rows
        check(
            rows.num_rows <= num_rows and rows.num_slots <= self._num_slots,
            lambda: (
                f"adapted rows must be below {num_rows} and slots below {self._num_slots},"
                f" got {rows.num_rows} rows, {rows.num_slots} slots"
            ),
        )
        flags = [adapters.is_adapted, *(each.has for each in adapters.affines)]
        check(
            all(len(each) >= self._num_sites for each in flags),
            lambda: f"is_adapted and has must have {self._num_sites} bytes, got {[len(each) for each in flags]}",
        )
        step.rows, step.is_adapted = rows.address, adapters.is_adapted
        if not adapters.affines:
            return None
        tables = (_Affines * len(adapters.affines))(
            *(
                _Affines(each.starts.data_ptr(), each.slots.data_ptr(), each.has, len(each.slots))
                for each in adapters.affines
            )
        )
        step.affines, step.num_affines = ctypes.addressof(tables), len(tables)
        return tables

    def _describe(self, layer: StackLayer) -> _Layer:
        num_heads, num_kv_heads, head_dim = self._heads
        hidden, mlp = self._hidden_width, self._mlp_width
        head_shape = (num_heads + num_kv_heads, head_dim)
        norms = ((layer.attention_norm, (hidden,)), (layer.mlp_norm, (hidden,)), (layer.head_norm, head_shape))
        for weight, shape in norms:
            if weight is not None:
                self._check_tensor("a norm's weight", weight, shape, self._dtype)
        has_head_norm = layer.head_norm is not None
        check(has_head_norm == (self._head_norm is not None), lambda: "all layers or none have norms of heads")
        shapes = ((hidden, self._qkv_width), (self._query_width, hidden), (hidden, 2 * mlp), (mlp, hidden))
        return _Layer(
            layer.attention_norm.data_ptr(),
            layer.mlp_norm.data_ptr(),
            None if layer.head_norm is None else layer.head_norm.data_ptr(),
            *(self._describe_linear(each, *shape) for each, shape in zip(layer.linears, shapes, strict=True)),
            layer.scale,
            layer.window,
        )

    def _describe_linear(self, linear: StackLinear, in_features: int, out_features: int) -> _Linear:
        weight, lora, affines = linear.weight, linear.lora, linear.affines
        check(
            weight.layout is self._layout and (weight.in_features, weight.out_features) == (in_features, out_features),
            lambda: (
                f"a weight must be in {self._layout.value}, {out_features} x {in_features},"
                f" got {weight.layout.value}, {weight.out_features} x {weight.in_features}"
            ),
        )
        assert isinstance(weight.absmax, Tensor)
        tiles = -(-out_features // TILE)
        self._check_tensor("codes", weight.codes, (tiles, in_features // 4, 2 * TILE), torch.uint8)
        self._check_tensor("constants", weight.absmax, (tiles, in_features // BLOCK, TILE), torch.float32)
        bias = linear.bias
        if bias is not None:
            self._check_tensor("bias", bias, (out_features,), self._dtype)
            bias = bias.float()  # once here and not at every step
            self._kept.append(bias)
        if lora is not None and affines is not None:
            self._check_tensor("affines", affines, (lora.num_slots,), torch.int64)
        return _Linear(
            weight.codes.data_ptr(),
            weight.absmax.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if lora is None else lora.address,
            None if lora is None else lora.arena.data_ptr(),
            None if affines is None else affines.data_ptr(),
            out_features,
            in_features,
            linear.site,
        )

    def _check_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(
            tensor.is_cpu and tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(),
            lambda: (
                f"{name} must be {dtype} {list(shape)}, contiguous, on the CPU,"
                f" got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            ),
        )
