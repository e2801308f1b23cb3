"""What an adapter's own tokenizer does otherwise than the base's. Imports no torch and no transformers.

The server finds it out when the adapter is loaded (`server/tokenizers.py`); here it is carried along with the version.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from .tokenizer_files import TokenizerFiles


@dataclass(frozen=True, eq=False)
class Detokenization:
    """How ids become text again, where that differs from the base's.

    Attributes:
        changed: id -> token where the base has another one or none; None: the base has one, this tokenizer has not.
        special: the special tokens, which are left out of text.
        decoder: of `tokenizers`, as JSON; "null": tokens are joined with spaces.
    """

    changed: Mapping[int, str | None]
    special: frozenset[str]
    decoder: str


@dataclass(frozen=True, eq=False)
class AdapterTokenizer:
    """A tokenizer that is not quite the base's. Versions that ship the same one share the object: compare with `is`.

    Attributes:
        digest: hex SHA-256 of what it is made of.
        backend: zlib-compressed tokenizer.json; None: text is tokenized as the base does.
        backend_digest: hex SHA-256 of it, uncompressed; None if and only if backend is.
        detokenization: None if and only if backend is.
        template: the chat template; None: the base's, with the base's special tokens.
        special_tokens: `bos_token` and so on -> token, for the template.
        eos_token_ids: what ends an answer, beside the base's.
    """

    digest: str
    backend: bytes | None
    backend_digest: str | None
    detokenization: Detokenization | None
    template: str | None
    special_tokens: Mapping[str, str]
    eos_token_ids: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Host memory that it takes, roughly."""
        changed = () if self.detokenization is None else self.detokenization.changed.values()
        tokens = sum(128 + len(token or "") for token in changed)
        return len(self.backend or b"") + tokens + len(self.template or "")


# Finds out whether an adapter needs a tokenizer of its own; None: the base's does the same. Takes the files and the
# adapter's vocabulary (None: the base's). Raises a ServingError for files that no tokenizer can be made of.
TokenizerMaker = Callable[[TokenizerFiles, int | None], AdapterTokenizer | None]


class AdapterVocabulary(NamedTuple):
    """What token ids mean to a request.

    Attributes:
        tokenizer: None: the base's.
        size: ids are below it; None: as many as the base has.
    """

    tokenizer: AdapterTokenizer | None = None
    size: int | None = None


BASE_VOCABULARY: Final = AdapterVocabulary()
