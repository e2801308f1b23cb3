"""From a prompt in one of its three forms to token ids. Tokenizing runs on a thread of its own, off the event loop.

Prompts for an adapter that brought a tokenizer of its own go another way (`tokenizers.py`).
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog

from ..adapters.adapter_tokenizer import BASE_VOCABULARY, AdapterTokenizer, AdapterVocabulary
from .engine.token_rules import TokenRules
from .errors import BadRequestError
from .tokenizers import Tokenizers, refusal

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue or to score; `field` is where the client gave it."""

    text: str
    field: str = "prompt"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to answer: (role, content) in order."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation, up to where the answer begins."""
        ...


class PromptEncoder:
    """Turns prompts into token ids.

    Args:
        tokenizer: the base's; nobody else uses it (the step thread decodes with a copy), since a fast tokenizer may
            refuse ("Already borrowed") while another thread is in it.
        vocab_size: rows of the embedding; token ids are below it.
        own: adapters' own tokenizers; closed by whoever made it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, own: Tokenizers | None = None) -> None:
        self._tokenizer = tokenizer
        self._own = own
        self.vocab_size = vocab_size
        # One thread: transformers' tokenizers are not documented to be thread-safe.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def encode(self, prompt: Prompt, vocabulary: AdapterVocabulary = BASE_VOCABULARY) -> list[int]:
        """Token ids of a prompt, at least one.

        Args:
            prompt: what the client gave.
            vocabulary: of the adapter that is to answer.

        Raises:
            BadRequestError: it has no token, an id is outside the vocabulary, or the chat template refuses it.
        """
        if isinstance(prompt, TokenPrompt):
            self.check_vocabulary("token_ids", prompt.token_ids, vocabulary)
            return list(prompt.token_ids)
        if vocabulary.tokenizer is None:
            token_ids = await self._run(prompt)
        else:
            token_ids = await self._encode_own(prompt, vocabulary.tokenizer)
        if not token_ids:
            raise BadRequestError("The prompt has no token; give at least one character.", {"field": _field(prompt)})
        self.check_vocabulary(_field(prompt), token_ids, vocabulary)  # some tokenizers know tokens without a row
        return token_ids

    def check_vocabulary(
        self, field: str, token_ids: Sequence[int], vocabulary: AdapterVocabulary = BASE_VOCABULARY
    ) -> None:
        """Refuse token ids that the base, or the adapter that is to answer, does not have.

        Raises:
            BadRequestError: names the field, the id, its position and the vocabulary size.
        """
        size = self.vocab_size if vocabulary.size is None else vocabulary.size
        # This runs on the event loop, and a prompt may be long: the loop over its tokens is Python's own.
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < size):
            return
        position, token_id = next((i, token) for i, token in enumerate(token_ids) if not 0 <= token < size)
        whose = "base" if vocabulary.size is None else "adapter"
        raise BadRequestError(
            f"{field} contains {token_id} (at position {position}); the {whose}'s vocabulary is 0 to {size - 1}.",
            {"field": field},
        )

    def rules(self, vocabulary: AdapterVocabulary) -> TokenRules | None:
        """What the engine needs to know of the tokens of a request; None: they are the base's."""
        return None if self._own is None else self._own.rules(vocabulary)

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, prompt: TextPrompt | ChatPrompt | str) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._encode, prompt)

    async def _encode_own(self, prompt: TextPrompt | ChatPrompt, tokenizer: AdapterTokenizer) -> list[int]:
        """Each part by whoever does it: the template, or the text, may be the base's."""
        own = self._own
        assert own is not None, "adapters have tokenizers only where the manager was given a maker"
        if isinstance(prompt, TextPrompt):
            if tokenizer.backend is None:
                return await self._run(prompt)
            written = await own.encode(tokenizer, prompt.text, None)
        elif tokenizer.template is not None:
            written = await own.encode(tokenizer, None, prompt.messages)
        elif tokenizer.backend is None:
            return await self._run(prompt)
        else:
            text = await asyncio.get_running_loop().run_in_executor(self._executor, self._write, prompt)
            written = await own.encode(tokenizer, text, prompt.messages)
        return await self._run(written) if isinstance(written, str) else written

    def _encode(self, prompt: TextPrompt | ChatPrompt | str) -> list[int]:
        if isinstance(prompt, TextPrompt):
            return self._tokenizer.encode(prompt.text, add_special_tokens=True)
        # The template has written the special tokens.
        text = self._write(prompt) if isinstance(prompt, ChatPrompt) else prompt
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _write(self, prompt: ChatPrompt) -> str:
        """A conversation as text, by the base's template."""
        if not self._tokenizer.chat_template:
            raise BadRequestError("This base has no chat template; use prompt or token_ids.", {"field": "messages"})
        conversation = [{"role": role, "content": content} for role, content in prompt.messages]
        try:
            return self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates refuse by raising (roles that do not alternate, an unknown role), each in its own words.
            log.info("chat template refused messages", exc_info=error)
            raise refusal("The base's", prompt.messages) from error


def _field(prompt: TextPrompt | ChatPrompt) -> str:
    return prompt.field if isinstance(prompt, TextPrompt) else "messages"
