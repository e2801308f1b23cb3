"""From logits to one drawn token per row: temperature, top-k, top-p, min-p and the draw itself, all rows at once.

Pure tensor functions for the sampler. Nothing here waits for the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .largest import largest_columns, largest_values, nucleus_candidates
from .upload import upload

# Rows are drawn from in two stages: which run of this many tokens, then which token in it.
_RUN = 256


def scale(logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Subtract each row's maximum and divide by the temperature: float32 [n, vocab], 0 for the likeliest token.

    Subtracting first keeps the tiniest temperatures finite: the likeliest token stays 0, the others go to -inf.

    Args:
        logits: float32 [n, vocab].
        inverse_temperature: float32 [n], finite.
    """
    return (logits - logits.amax(-1, keepdim=True)).mul_(inverse_temperature.unsqueeze(-1))


def nucleus_threshold(descending: Tensor, top_k: Tensor, top_p: Tensor, total: Tensor | None = None) -> Tensor:
    """The smallest scaled logit that top-k and then top-p (of what top-k leaves) keep: float32 [n].

    Args:
        descending: the largest scaled logits of each row in descending order, float32 [n, m], first column 0.
        top_k: int64 [n], 1 to m.
        top_p: float32 [n], in (0, 1].
        total: float32 [n], weight of what top_p is a share of; None: of the first top_k columns.
    """
    weights = descending.exp()
    mass = weights.cumsum(-1)
    whole = mass.gather(-1, top_k.unsqueeze(-1) - 1) if total is None else total.unsqueeze(-1)
    # A token is kept while the mass before it is short of top_p; the first one always is.
    in_nucleus = (mass - weights < whole * top_p.unsqueeze(-1)) | (top_p.unsqueeze(-1) >= 1.0)
    kept = in_nucleus & (torch.arange(descending.shape[-1], device=descending.device) < top_k.unsqueeze(-1))
    return descending.gather(-1, kept.sum(-1, keepdim=True).clamp_(min=1) - 1).squeeze(-1)


def top_k_threshold(scaled: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """The smallest scaled logit that top-k, and then top-p, keep: float32 [n].

    Args:
        scaled: float32 [n, vocab], from `scale`.
        top_k: of each row, 1 to vocab.
        top_p: of each row, in (0, 1].
    """
    if scaled.is_cpu:
        descending = _padded([largest_values(row, k) for row, k in zip(scaled.numpy(), top_k, strict=True)])
    else:
        descending = scaled.topk(max(top_k), -1).values
    device = scaled.device
    return nucleus_threshold(descending, upload(top_k, torch.int64, device), upload(top_p, torch.float32, device))


def top_p_threshold(scaled: Tensor, top_p: Sequence[float]) -> Tensor:
    """The smallest scaled logit that top-p keeps: float32 [n].

    Args:
        scaled: float32 [n, vocab], from `scale`.
        top_p: of each row, below 1.
    """
    if scaled.is_cpu:
        weights = scaled.exp()
        sums = weights.sum(-1, dtype=torch.float64)
        rows = zip(scaled.numpy(), weights.numpy(), sums.tolist(), top_p, strict=True)
        descending, total = _padded([nucleus_candidates(*row) for row in rows]), sums.float()
    else:
        descending, total = scaled.sort(-1, descending=True).values, None
    device = scaled.device
    columns = torch.full(descending.shape[:1], descending.shape[1], dtype=torch.int64, device=device)
    return nucleus_threshold(descending, columns, upload(top_p, torch.float32, device), total)


def likeliest(log_probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in descending order, and their columns: float32 and int64 [n, count]."""
    if not log_probabilities.is_cpu or not count:
        values, columns = log_probabilities.topk(count, -1)
        return values, columns
    columns = torch.from_numpy(np.stack([largest_columns(row, count) for row in log_probabilities.numpy()]))
    return log_probabilities.gather(-1, columns), columns


def _padded(rows: Sequence[NDArray[np.float32]]) -> Tensor:
    """The rows, filled up to one length with what has no weight."""
    padded = np.full((len(rows), max(1, *map(len, rows))), -np.inf, np.float32)
    for values, row in zip(rows, padded, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def draw(scaled: Tensor, threshold: Tensor | None, uniform: Tensor) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution: int64 [n].

    Args:
        scaled: float32 [n, vocab], from `scale`; used up.
        threshold: float32 [n], at most 0; tokens below are excluded, those equal to it are kept. None excludes nothing.
        uniform: float64 [n], in [0, 1).

    A row that holds NaN gives some token of the vocabulary.
    """
    num_rows, vocab = scaled.shape
    kept = scaled >= threshold.unsqueeze(-1) if threshold is not None else None
    weights = scaled.exp_()
    if kept is not None:
        weights *= kept
    if vocab % _RUN:
        weights = torch.nn.functional.pad(weights, (0, _RUN - vocab % _RUN))
    runs = weights.view(num_rows, -1, _RUN)
    # float32 sums of a run are exact to 1e-7 of the run; what adds up over the vocabulary is float64.
    run, rest = _invert(runs.sum(-1).double(), uniform)
    inside = runs.gather(1, run.view(-1, 1, 1).expand(-1, 1, _RUN)).squeeze(1)
    token, _ = _invert(inside.double(), rest)
    return (run * _RUN + token).clamp_(max=vocab - 1)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first column where the cumulative weight exceeds `uniform` of the total, and how far into it that falls.

    Args:
        weights: float64 [n, m], not negative, each row with a positive one.
        uniform: float64 [n], in [0, 1).

    Returns:
        int64 [n], of a positive weight, and float64 [n] in [0, 1).
    """
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    # Rounding must not lift the target to the total: it would fall behind the last token.
    target = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    column = torch.searchsorted(mass, target, right=True).clamp_(max=weights.shape[-1] - 1)  # beyond: only for NaN
    width = weights.gather(-1, column)
    before = mass.gather(-1, column) - width
    rest = ((target - before) / width).clamp_(0.0, 1.0 - 2.0**-53)
    return column.squeeze(-1), rest.squeeze(-1)
