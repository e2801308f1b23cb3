"""From one sampled token to the events that the client gets: text, and whether this was the last one. Step thread."""

from collections.abc import Callable

from .detokenizer import TextStream
from .request import Delta, Finished, FinishReason, Request
from .sampler import SampledToken

TextStreamFactory = Callable[[Request], TextStream]


class Output:
    """The output of one request.

    A token that ends the request (the model's end of sequence, a stop token) is reported and counted, but has no text.
    Stop strings are searched for in what comes after min_tokens. `Finished.stop` is None at the end of sequence.

    Args:
        request: its `output_token_ids` grow here.
        make_stream: called at the first token.
        eos_token_ids: the model's; a request with a tokenizer of its own has its own.
        max_tokens: prompt and output at most; reaching it is FinishReason.LENGTH.
    """

    def __init__(
        self, request: Request, make_stream: TextStreamFactory, eos_token_ids: frozenset[int], max_tokens: int
    ) -> None:
        self._request = request
        self._make_stream = make_stream
        self._stream: TextStream | None = None
        eos = eos_token_ids if request.tokens is None else request.tokens.eos_token_ids
        self._eos_token_ids = frozenset() if request.params.ignore_eos else eos
        self._max_tokens = max_tokens

    def add(self, sampled: SampledToken) -> tuple[Delta, Finished | None]:
        """Append a token; returns its delta, and how the request ended if it did."""
        request, token_id = self._request, sampled.token_id
        if self._stream is None:
            self._stream = self._make_stream(request)
        stream = self._stream
        request.output_token_ids.append(token_id)
        num_output = len(request.output_token_ids)
        reason: FinishReason | None = None
        stop: str | int | None = None
        # Below min_tokens the sampler never chooses either of these.
        if token_id in request.params.stop_token_ids:
            reason, stop = FinishReason.STOP, token_id
        elif token_id in self._eos_token_ids:
            reason = FinishReason.STOP
        text = "" if reason else stream.push(token_id, may_stop=num_output >= request.params.min_tokens)
        if stream.stop is None and not reason and self._is_full(num_output):
            reason = FinishReason.LENGTH
        if reason:
            text += stream.finish()
        if stream.stop is not None:
            reason, stop = FinishReason.STOP, stream.stop
        delta = Delta(text, (token_id,), () if sampled.logprob is None else (sampled.logprob,))
        return delta, None if reason is None else self._finished(reason, stop)

    def _is_full(self, num_output: int) -> bool:
        return num_output >= self._request.params.max_tokens or self._request.num_tokens >= self._max_tokens

    def _finished(self, reason: FinishReason, stop: str | int | None) -> Finished:
        request = self._request
        return Finished(
            reason=reason,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=request.num_cached_tokens,
            output_tokens=len(request.output_token_ids),
            stop=stop,
        )
