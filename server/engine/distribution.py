"""From logits to one drawn token per row: temperature, top-k, top-p, min-p and the draw itself, all rows at once.

Pure tensor functions for the sampler on a device, and on a CPU without native kernels; those (`kernels/draw.py`) are
tested against these. Nothing here waits for the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .largest import largest_columns
from .sampling_params import SamplingParams
from .upload import upload

# Rows are drawn from in two stages: which run of this many tokens, then which token in it.
_RUN = 256


def draw_on_device(
    logits: Tensor, params: Sequence[SamplingParams], inverse: Sequence[float], numbers: Sequence[float]
) -> Tensor:
    """Draw one token per row, each by its own parameters: int64 [n].

    Args:
        logits: float32 [n, vocab].
        params: of each row, not greedy.
        inverse: temperatures, finite.
        numbers: in [0, 1).

    A row that holds NaN gives some token of the vocabulary.
    """
    device, vocab = logits.device, logits.shape[-1]
    scaled = scale(logits, upload(inverse, torch.float32, device))
    # min_p is a share of the largest probability, which is exp(0) here.
    threshold = upload([p.min_p for p in params], torch.float32, device).log_()
    by_top_k = [row for row, p in enumerate(params) if 0 < p.top_k < vocab]
    if by_top_k:
        top_k, top_p = [params[row].top_k for row in by_top_k], [params[row].top_p for row in by_top_k]
        _raise(threshold, by_top_k, top_k_threshold(some_rows(scaled, by_top_k), top_k, top_p))
    by_top_p = [row for row, p in enumerate(params) if not 0 < p.top_k < vocab and p.top_p < 1.0]
    if by_top_p:
        top_p = [params[row].top_p for row in by_top_p]
        _raise(threshold, by_top_p, top_p_threshold(some_rows(scaled, by_top_p), top_p))
    is_cut = bool(by_top_k or by_top_p or any(p.min_p for p in params))
    return draw(scaled, threshold if is_cut else None, upload(numbers, torch.float64, device))


def _raise(threshold: Tensor, rows: list[int], least: Tensor) -> None:
    """Raise the thresholds of `rows` to what another filter keeps at least."""
    at = upload(rows, torch.int64, threshold.device)
    threshold[at] = torch.maximum(threshold[at], least)


def some_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows: a copy, or the tensor itself when that is all of them."""
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, upload(rows, torch.int64, tensor.device))


def scale(logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Subtract each row's maximum and divide by the temperature: float32 [n, vocab], 0 for the likeliest token.

    Subtracting first keeps the tiniest temperatures finite: the likeliest token stays 0, the others go to -inf.

    Args:
        logits: float32 [n, vocab].
        inverse_temperature: float32 [n], finite.
    """
    return (logits - logits.amax(-1, keepdim=True)).mul_(inverse_temperature.unsqueeze(-1))


def nucleus_threshold(descending: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest scaled logit that top-k and then top-p (of what top-k leaves) keep: float32 [n].

    Args:
        descending: the largest scaled logits of each row in descending order, float32 [n, m], first column 0.
        top_k: int64 [n], 1 to m.
        top_p: float32 [n], in (0, 1].
    """
    weights = descending.exp()
    mass = weights.cumsum(-1)
    whole = mass.gather(-1, top_k.unsqueeze(-1) - 1)
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
    descending = scaled.topk(max(top_k), -1).values
    device = scaled.device
    return nucleus_threshold(descending, upload(top_k, torch.int64, device), upload(top_p, torch.float32, device))


def top_p_threshold(scaled: Tensor, top_p: Sequence[float]) -> Tensor:
    """The smallest scaled logit that top-p keeps: float32 [n].

    Args:
        scaled: float32 [n, vocab], from `scale`.
        top_p: of each row, below 1.
    """
    descending = scaled.sort(-1, descending=True).values
    device = scaled.device
    columns = torch.full(descending.shape[:1], descending.shape[1], dtype=torch.int64, device=device)
    return nucleus_threshold(descending, columns, upload(top_p, torch.float32, device))


def likeliest(log_probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in descending order, and their columns: float32 and int64 [n, count]."""
    if not log_probabilities.is_cpu or not count:
        values, columns = log_probabilities.topk(count, -1)
        return values, columns
    columns = torch.from_numpy(np.stack([largest_columns(row, count) for row in log_probabilities.numpy()]))
    return log_probabilities.gather(-1, columns), columns


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
