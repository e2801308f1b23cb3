"""An adapter in host memory exactly as it will lie in the device arena, so that bringing it in is one copy.

Layout: site by site in site-index order, only the sites it adapts. Inside a site of input width K whose slices have
ranks r_0, r_1, ... and widths N_0, N_1, ...:

    [0, R*K)                  lora_A rows of all slices, [R, K] row-major, R = r_0 + r_1 + ...
    [R*K, R*K + r_0*N_0)      lora_B of slice 0 transposed, [r_0, N_0] row-major, scaling folded in
    ...                       the same for the further slices

A slice of rank 0 (not adapted) takes no element: nothing is padded. For example, rank 2 on q (N 8) and rank 1 on v
(N 4) of a qkv site with K = 8 is A [3, 8], then [2, 8], then [1, 4]: 24 + 16 + 4 elements, site_ranks row (2, 0, 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import AdaptedModule, Checkpoint
from .errors import AdapterIncompatibleError, AdapterInvalidError
from .finite import all_finite
from .report import AdapterReport, make_report
from .sites import Site, SiteTable
from .tensor_map import count_elements

# Elements; where tensors begin that matmuls read directly.
REGION_ALIGNMENT: Final = 64


class Region(NamedTuple):
    """A tensor inside `PackedAdapter.data`: contiguous, from element `start` on, a multiple of REGION_ALIGNMENT."""

    start: int
    shape: tuple[int, ...]


class OverrideKind(StrEnum):
    """What an adapter does to a module beside adding low-rank deltas to sites.

    WEIGHT: the module runs with its own `weight` and `bias` regions (either may be missing) in place of the base's.
    EMBEDDING_LORA: adds `b` [r, dim] times row `a` [num_embeddings, r] of the token; scaling is folded into `b`.
    TOKENS: the embedding's rows of `token_ids` are those of `rows` [n, dim]; for the head: the logits of `token_ids`
        are the products with `rows`.
    """

    WEIGHT = "weight"
    EMBEDDING_LORA = "embedding_lora"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Override:
    """One module's.

    Attributes:
        module: path in the base: of a `modules.Module`, or of a slice of a site (WEIGHT; TOKENS for the head).
        kind: what is done, and which regions there are.
        regions: by name.
        token_ids: int64 [n] on the CPU, ascending; TOKENS only.
    """

    module: str
    kind: OverrideKind
    regions: Mapping[str, Region]
    token_ids: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """One adapter version, ready to be copied into the arena.

    Attributes:
        data: [elements], arena dtype, CPU (pinned when the arena is on CUDA).
        site_offsets: int64 [num_sites], element offset of each site's block in `data`; -1 = not adapted.
        site_ranks: int32 [num_sites, max_slices]; 0 = not adapted.
        report: what was applied.
        site_affines: int64 [num_sites], element offset in `data` of [2, out_features]: gains and offsets of the site,
            with y := y * gain + offset before the low-rank delta is added (DoRA, biases); -1 = none. A multiple of
            REGION_ALIGNMENT.
        overrides: see there; at most one of a kind for a module.
        vocab_size: token ids that it knows are below this; None: as many as the base has.
    """

    data: Tensor
    site_offsets: Tensor
    site_ranks: Tensor
    report: AdapterReport
    site_affines: Tensor
    overrides: tuple[Override, ...] = ()
    vocab_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, in host memory and on the device alike."""
        return self.data.numel() * self.data.element_size()


def pack_adapter(
    checkpoint: Checkpoint, sites: SiteTable, *, dtype: torch.dtype, pin_memory: bool, allow_zero: bool = False
) -> PackedAdapter:
    """Lay an adapter out for the arena, folding its scaling (and AdaLoRA's singular values) into lora_B.

    Scaling is applied in float32 and the result rounded to the arena's type once.

    Args:
        checkpoint: checked tensors, every module in `sites`.
        sites: the base's sites.
        dtype: the arena's.
        pin_memory: whether copies go to a CUDA device.
        allow_zero: accept an adapter whose delta is zero everywhere.

    Raises:
        AdapterIncompatibleError: a scaled value is too large for `dtype`; names the tensor.
        AdapterInvalidError: the delta is zero and that is not allowed.
    """
    scalings = {module: tensors.scaling for module, tensors in checkpoint.modules.items()}
    data = _host_memory(count_elements(scalings, sites), dtype, pin_memory=pin_memory)
    site_offsets = torch.full((len(sites.sites),), -1, dtype=torch.int64)
    site_ranks = torch.zeros((len(sites.sites), sites.max_slices), dtype=torch.int32)
    end = 0
    zero = True
    for site in sites.sites:
        modules = checkpoint.modules
        slices = {i: modules[piece.module] for i, piece in enumerate(site.slices) if piece.module in modules}
        if not any(tensors.scaling.rank for tensors in slices.values()):
            continue
        site_offsets[site.index] = end
        for index, tensors in slices.items():
            site_ranks[site.index, index] = tensors.scaling.rank
        end, zero = _pack_site(data, end, site, slices, zero)
    assert end == data.numel()
    if zero and not allow_zero:
        raise AdapterInvalidError(
            "The adapter's delta is zero everywhere: it would answer exactly like the base. Was it saved before "
            "training? Loading it must be allowed explicitly (allow_zero)."
        )
    site_affines = torch.full((len(sites.sites),), -1, dtype=torch.int64)
    return PackedAdapter(data, site_offsets, site_ranks, make_report(checkpoint.config, scalings), site_affines)


def _host_memory(count: int, dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Elements in host memory, not set.

    Memory that is not pinned comes from numpy, which asks for huge pages: giving 200 MB of small ones back holds the
    interpreter lock, and so the step thread, for 8 to 10 ms (AMD EPYC, Zen 3; 2026-11-22).
    """
    if pin_memory:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


def _pack_site(data: Tensor, start: int, site: Site, slices: dict[int, AdaptedModule], zero: bool) -> tuple[int, bool]:
    """Write one site's block at `start`; returns where it ends and whether the delta is zero up to there."""
    width = site.in_features
    end_a = start
    end = start + sum(t.scaling.rank for t in slices.values()) * width
    for index, tensors in slices.items():
        rank, out = tensors.scaling.rank, site.slices[index].out_features
        rows_a = data[end_a : end_a + rank * width].view(rank, width)
        rows_b = data[end : end + rank * out].view(rank, out)
        rows_a.copy_(tensors.lora_a)
        rows_b.copy_(_scaled_b(tensors))
        if not (all_finite(rows_a) and all_finite(rows_b)):
            raise AdapterIncompatibleError(
                f"Tensor {tensors.b_name!r} times its scaling ({tensors.scaling.factor:g}), or the lora_A beside it, "
                f"has values that do not fit into {data.dtype}.",
                {"tensor": tensors.b_name[:256]},
            )
        zero = zero and not bool((rows_a.any(dim=1) & rows_b.any(dim=1)).any())
        end_a += rank * width
        end += rank * out
    return end, zero


def _scaled_b(tensors: AdaptedModule) -> Tensor:
    """B^T scaled: factor * B^T (AdaLoRA: factor * diag(E) * B^T): [rank, out_features], float32."""
    scaled = tensors.lora_b.to(torch.float32).t() * tensors.scaling.factor
    return scaled if tensors.lora_e is None else scaled * tensors.lora_e.to(torch.float32)
