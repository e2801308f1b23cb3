"""Makes the tokenizers that adapters bring along."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorikeet.adapters.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lorikeet.server.engine.detokenizer import DetokenizerFactory
from lorikeet.server.prompts import PromptEncoder
from lorikeet.server.tokenizers import Tokenizers
from transformers import AutoTokenizer


class OwnWorld:
    """A base's tokenizer, what the server makes of others, and the encoder that uses both."""

    def __init__(self, model: Path, scratch: Path, **settings: Any) -> None:
        self.model = model
        self.scratch = scratch
        self.base = AutoTokenizer.from_pretrained(model)
        self.size = len(self.base)
        self.eos = frozenset({self.base.eos_token_id})
        detokenizers = DetokenizerFactory(self.base)
        self.tokenizers = Tokenizers(self.base, detokenizers.backend, self.eos, self.size, **settings)
        self.encoder = PromptEncoder(self.base, self.size, self.tokenizers)

    def close(self) -> None:
        self.encoder.close()
        self.tokenizers.close()

    def saved(self, change: Callable[[Any], None], **settings: Any) -> tuple[Any, TokenizerFiles]:
        """The base's tokenizer, changed, as transformers loads it from an adapter folder; and the folder's files."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        change(tokenizer)
        folder = self.scratch / str(len(list(self.scratch.iterdir())))
        tokenizer.save_pretrained(folder, **settings)
        return AutoTokenizer.from_pretrained(folder), read_tokenizer_files(folder)
