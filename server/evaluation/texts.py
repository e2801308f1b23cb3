"""Texts to evaluate on, from a file. Imports no torch."""

import re
from pathlib import Path

from .errors import EvaluationError, TextTooShortError


def read_texts(path: Path, *, by_paragraph: bool = False) -> list[str]:
    """A file as one text, or as one text for each paragraph.

    Args:
        path: UTF-8.
        by_paragraph: paragraphs, which blank lines separate, are texts of their own: none is context of the next.

    Raises:
        EvaluationError: the file cannot be read or is not UTF-8.
        TextTooShortError: there is no text in it.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EvaluationError(f"{path} is not UTF-8 text.", {"field": "text"}) from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror}.", {"field": "text"}) from error
    parts = re.split(r"\n\s*\n", content.strip("\n")) if by_paragraph else [content]
    texts = [part for part in parts if part.strip()]
    if not texts:
        raise TextTooShortError(f"{path} has no text in it.", {"field": "text"})
    return texts
