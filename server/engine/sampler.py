"""Chooses the next token of every request of a step, each by its own parameters. Step thread only.

Order of operations, per request: penalties on the raw logits, then min_tokens (masks the tokens that would end the
request), then temperature, top-k, top-p of what top-k leaves, min-p, and the draw. Tokens tied with the last one that a
filter keeps are kept too, so the result depends on no sorting order. Log probabilities are those of the raw logits: the
model's own distribution, before all of that.

A draw uses one number that depends only on the request's seed and the index of the token (`random_draws.py`). The same
request with the same seed therefore gives the same tokens whatever shares its batch and however often it was preempted,
as far as the logits are the same: kernels may round differently for another batch size, which changes a token when the
number falls within that rounding of the border between two tokens.

Rows that need nothing but the likeliest token cost one `max` over the batch; every other feature works on the rows that
need it. The only wait for the device is the one copy of what was chosen to the host.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels import draw
from .distribution import draw_on_device, likeliest, some_rows
from .random_draws import uniform
from .request import Request, TokenLogprob
from .token_counts import TokenCounts
from .upload import upload
from .winners import Winners

_NOT_FINITE = -1  # in place of a token id, on its way to the host
_MOST_INVERSE_TEMPERATURE = 1e38  # float32; below 1e-38 a temperature is zero for every pair of distinct logits


class SampledToken(NamedTuple):
    """A chosen token; `logprob` if the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Batched sampling.

    Args:
        eos_token_ids: what ends a request unless it says ignore_eos; masked below min_tokens.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._winners = Winners()
        self._winners_of_edited = Winners()  # found while those of the whole step are still needed

    @torch.inference_mode()
    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
        """Choose a token for each row.

        Args:
            logits: float32 [n, vocab] on any device; left as it is.
            requests: one per row, with the tokens drawn so far in `output_token_ids`.

        Returns:
            In row order; None where the model's logits were not finite.
        """
        best, tokens = self._winners.find(logits)
        other = [row for row, request in enumerate(requests) if not request.takes_likeliest]
        if not other:
            return self._fetch()
        special = [row for row in other if not requests[row].params.greedy or self._is_edited(requests[row])]
        if special:
            chosen = self._choose(some_rows(logits, special), [requests[row] for row in special])
            tokens.index_copy_(0, upload(special, torch.int64, logits.device), chosen)
        reporting = [row for row in other if requests[row].params.logprobs is not None]
        if not reporting:
            return self._fetch()
        tokens = torch.where(best.isfinite(), tokens, _NOT_FINITE)
        return self._with_logprobs(logits, tokens, requests, reporting)

    def _fetch(self) -> list[SampledToken | None]:
        best, tokens = self._winners.fetch()
        if np.isfinite(best).all():
            return [SampledToken(token, None) for token in tokens.tolist()]
        tokens = np.where(np.isfinite(best), tokens, _NOT_FINITE)
        return [_sampled(token, None) for token in tokens.tolist()]

    def _is_edited(self, request: Request) -> bool:
        """Whether the request's logits are changed before the likeliest is taken."""
        return request.params.has_penalties or self._must_go_on(request)

    def _must_go_on(self, request: Request) -> bool:
        return len(request.output_token_ids) < request.params.min_tokens

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Tokens of rows that need more than the maximum: int64 [n]."""
        if any(self._is_edited(request) for request in requests):
            logits = logits.clone()
        self._penalize(logits, requests)
        self._mask_ends(logits, requests)
        sampled = [row for row, request in enumerate(requests) if not request.params.greedy]
        if len(sampled) == len(requests):
            return self._draw(logits, requests)
        tokens = self._winners_of_edited.find(logits)[1]
        if sampled:
            drawn = self._draw(some_rows(logits, sampled), [requests[row] for row in sampled])
            tokens.index_copy_(0, upload(sampled, torch.int64, logits.device), drawn)
        return tokens

    def _draw(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Draw from each row's distribution: int64 [n]."""
        params = [request.params for request in requests]
        inverse = [min(1.0 / p.temperature, _MOST_INVERSE_TEMPERATURE) for p in params]
        numbers = [uniform(request.seed, len(request.output_token_ids)) for request in requests]
        if not logits.is_cpu or not draw.is_available():
            return draw_on_device(logits, params, inverse, numbers)
        vocab = logits.shape[-1]
        rows = zip(params, inverse, numbers, strict=True)
        return draw.draw(
            logits,
            [draw.Draw(number, scale, p.top_p, p.min_p, min(p.top_k, vocab)) for p, scale, number in rows],
        )

    def _penalize(self, logits: Tensor, requests: Sequence[Request]) -> None:
        rows = [row for row, request in enumerate(requests) if request.params.has_penalties]
        if not rows:
            return
        counts = [_update_counts(requests[row]) for row in rows]
        sizes = [len(count.ids) for count in counts]

        def each(values: Sequence[float]) -> Tensor:
            """A parameter per row, repeated for each token that the row has seen."""
            return upload(np.repeat(np.asarray(values, np.float32), sizes), torch.float32, logits.device)

        params = [requests[row].params for row in rows]
        where = upload(np.repeat(np.asarray(rows, np.int64), sizes), torch.int64, logits.device)
        ids = upload(np.concatenate([count.ids for count in counts]), torch.int64, logits.device)
        said = upload(np.concatenate([count.said for count in counts]), torch.float32, logits.device)
        seen = logits[where, ids]
        repetition = each([p.repetition_penalty for p in params])
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        seen -= said * each([p.frequency_penalty for p in params])
        seen -= (said > 0) * each([p.presence_penalty for p in params])
        # The smallest repetition penalties overflow.
        logits[where, ids] = seen.clamp_(torch.finfo(seen.dtype).min, torch.finfo(seen.dtype).max)

    def _mask_ends(self, logits: Tensor, requests: Sequence[Request]) -> None:
        pairs = [
            (row, token)
            for row, request in enumerate(requests)
            if self._must_go_on(request)
            for token in {*request.params.stop_token_ids, *self._ends_of(request)}
            if token < logits.shape[-1]  # others cannot be drawn
        ]
        if pairs:
            where, ids = zip(*pairs, strict=True)
            device = logits.device
            logits[upload(where, torch.int64, device), upload(ids, torch.int64, device)] = -torch.inf

    def _ends_of(self, request: Request) -> Collection[int]:
        if request.params.ignore_eos:
            return ()
        return self._eos_token_ids if request.tokens is None else request.tokens.eos_token_ids

    def _with_logprobs(
        self, logits: Tensor, tokens: Tensor, requests: Sequence[Request], rows: list[int]
    ) -> list[SampledToken | None]:
        wanted = [requests[row].params.logprobs or 0 for row in rows]
        num_top = min(max(wanted), logits.shape[-1])
        raw = some_rows(logits, rows).log_softmax(-1)
        chosen = tokens[upload(rows, torch.int64, logits.device)].clamp(min=0)
        top_logprobs, top_ids = likeliest(raw, num_top)
        # One copy to the host: token ids as int32, log probabilities as the bits of float32.
        packed = torch.cat(
            [
                tokens.int(),
                raw.gather(-1, chosen.unsqueeze(-1)).view(torch.int32).flatten(),
                top_ids.int().flatten(),
                top_logprobs.contiguous().view(torch.int32).flatten(),
            ]
        ).cpu()
        sizes = [len(tokens), len(rows), len(rows) * num_top, len(rows) * num_top]
        token_ids, chosen_bits, ids, bits = packed.split(sizes)
        token_list = token_ids.tolist()
        results = [_sampled(token, None) for token in token_list]
        columns = zip(
            rows,
            wanted,
            chosen_bits.view(torch.float32).tolist(),
            ids.view(len(rows), num_top).tolist(),
            bits.view(torch.float32).view(len(rows), num_top).tolist(),
            strict=True,
        )
        for row, num_wanted, logprob, alternatives, logprobs in columns:
            top = tuple(zip(alternatives[:num_wanted], logprobs[:num_wanted], strict=True))
            results[row] = _sampled(token_list[row], TokenLogprob(token_list[row], logprob, top))
        return results


def _update_counts(request: Request) -> TokenCounts:
    if request.token_counts is None:
        request.token_counts = TokenCounts(request.prompt_token_ids)
    request.token_counts.update(request.output_token_ids)
    return request.token_counts


def _sampled(token: int, logprob: TokenLogprob | None) -> SampledToken | None:
    return None if token == _NOT_FINITE else SampledToken(token, logprob)
