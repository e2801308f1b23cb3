"""From token ids to text, piece by piece. Imports no torch; one `Detokenizer` per request, on the step thread.

A character can be spread over several tokens, a token's text can depend on the one before it (a leading space), and a
tokenizer can only decode lists of ids. So a window of recent ids is decoded at each step and what is new at its end is
the piece. Bytes of an unfinished character show up as U+FFFD at the end and are held back.

Not `tokenizers.DecodeStream`: it holds back the finished text before an unfinished character too, raises on some id
sequences that decode well as a whole, and has no way to hand out what is left at the end.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from .request import Request
from .stop_strings import StopStrings
from .token_rules import Decode

_UNFINISHED = "\ufffd"
_PROMPT_TOKENS = 6  # of context for the first token's text
_WINDOW = 16  # ids from which on the window is shortened
_LONGEST_WINDOW = 64  # ids without the end of a character: these bytes are no text, show them as they are


class TextStream(Protocol):
    """What the engine needs of a request's detokenizer."""

    @property
    def stop(self) -> str | None:
        """The stop string that was found; the request ends."""
        ...

    def push(self, token_id: int, *, may_stop: bool) -> str:
        """Add a token; returns the text that can be shown by now."""
        ...

    def finish(self) -> str:
        """The request ends here: what was held back."""
        ...


class DetokenizerFactory:
    """Makes the text stream of a request.

    Args:
        tokenizer: of transformers. A twin is used: tokenizing prompts on another thread with the same object can make
            `decode` raise "Already borrowed". And of a fast one only the backend: the wrapper may "clean up" spaces,
            which changes text that was already sent.
        skip_special_tokens: leave special tokens out of the text.

    Attributes:
        backend: the twin; only the step thread uses it, and nothing changes it.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self.backend = decoder = _twin(getattr(tokenizer, "backend_tokenizer", tokenizer))

        def decode(token_ids: Sequence[int]) -> str:
            text: str = decoder.decode(token_ids, skip_special_tokens=skip_special_tokens)
            return text

        self._decode: Decode = decode

    def __call__(self, request: Request) -> TextStream:
        """A new stream, at the end of the request's prompt."""
        stops = StopStrings(request.params.stop, include_stop=request.params.include_stop)
        rules = request.tokens
        decode = self._decode if rules is None or rules.decode is None else rules.decode
        return Detokenizer(decode, request.prompt_token_ids, stops)


def _twin(tokenizer: Any) -> Any:
    """A tokenizer that does the same and whose settings are its own.

    It shares the parts, which are only read. A copy of them goes through JSON: 0.2 s for 49,152 tokens (start of
    `lorikeet serve` on the demo base, a core of an AMD EPYC, Zen 3; tokenizers 0.23.3; 2026-11-23).
    """
    if not isinstance(tokenizer, Tokenizer) or tokenizer.truncation is not None or tokenizer.padding is not None:
        return copy.deepcopy(tokenizer)
    twin = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(twin, part, getattr(tokenizer, part))
    added = tokenizer.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    # Ids are given in order: a gap before one would move it.
    return twin if twin.get_added_tokens_decoder() == added else copy.deepcopy(tokenizer)


class Detokenizer:
    """Incremental text of one request.

    Args:
        decode: all ids to text; bytes that are no UTF-8 become U+FFFD.
        prompt: what the output continues.
        stops: the request's stop strings.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: StopStrings) -> None:
        self._decode = decode
        self._stops = stops
        self._window = list(prompt[-_PROMPT_TOKENS:])
        self._num_shown = len(decode(self._window))  # characters of the window's text that are not new
        self._cut = 0  # where the window may be shortened: no character spans this index

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    def push(self, token_id: int, *, may_stop: bool) -> str:
        """Add a token; returns the text that can be shown by now, which may be empty.

        Args:
            token_id: the next output token.
            may_stop: False lets stop strings that begin in this token's text pass (min_tokens is not reached).
        """
        return self._search(self._new_text(token_id), may_stop)

    def finish(self) -> str:
        """What was held back: bytes without the rest of their character, and the beginning of a stop string.

        A stop string can be found in it still.
        """
        text = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(text)
        return self._stops.push(text) + self._stops.flush()

    def _search(self, text: str, may_stop: bool) -> str:
        return self._stops.push(text) if may_stop else text

    def _new_text(self, token_id: int) -> str:
        window = self._window
        window.append(token_id)
        text = self._decode(window)
        if len(window) > _LONGEST_WINDOW:
            new = text[self._num_shown :]
            self._restart([])
            return new
        whole = text.rstrip(_UNFINISHED)
        if whole == text:
            # Bytes held back in the prompt's last tokens can have become fewer characters.
            self._num_shown = min(self._num_shown, len(text))
        new = whole[self._num_shown :]
        self._num_shown += len(new)
        if whole == text:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Drop the window's first half when it is long. Called where it ends with a whole character."""
        if len(self._window) >= _WINDOW and self._cut:
            rest = self._window[self._cut :]
            if self._decode(rest):  # else only special tokens: the text before them is still the context
                self._restart(rest)
        if not self._cut and len(self._window) >= _WINDOW // 2:
            self._cut = len(self._window)

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._num_shown = len(self._decode(window))
        self._cut = 0
