"""Ids to text with an adapter's own tokens, on the step thread. Imports no torch and no transformers."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ...adapters.adapter_tokenizer import Detokenization
from .token_rules import Decode


def make_decode(how: Detokenization, base: Tokenizer) -> Decode:
    """What `Tokenizer.decode` does, with tokens that lie beside the base's."""
    decoder = _decoder(how.decoder)
    changed, special = how.changed, how.special

    def decode(token_ids: Sequence[int]) -> str:
        tokens = (changed[index] if index in changed else base.id_to_token(index) for index in token_ids)
        shown = [token for token in tokens if token is not None and token not in special]
        return " ".join(shown) if decoder is None else decoder.decode(shown)

    return decode


@functools.lru_cache(maxsize=64)
def _decoder(text: str) -> Any:
    """The decoder of `tokenizers` that this JSON describes, or None. Takes microseconds: it has no vocabulary."""
    frame = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": json.loads(text),
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    }
    return Tokenizer.from_str(json.dumps(frame)).decoder
