"""From a prompt in one of its three forms to token ids. Tokenizing runs on a thread of its own, off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog

from .errors import BadRequestError

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue."""

    text: str


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
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        # One thread: transformers' tokenizers are not documented to be thread-safe.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, at least one.

        Raises:
            BadRequestError: it has no token, an id is outside the vocabulary, or the chat template refuses it.
        """
        if isinstance(prompt, TokenPrompt):
            self.check_vocabulary("token_ids", prompt.token_ids)
            return list(prompt.token_ids)
        token_ids = await asyncio.get_running_loop().run_in_executor(self._executor, self._encode, prompt)
        if not token_ids:
            raise BadRequestError("The prompt has no token; give at least one character.", {"field": _field(prompt)})
        return token_ids

    def check_vocabulary(self, field: str, token_ids: tuple[int, ...]) -> None:
        """Refuse token ids that the base does not have.

        Raises:
            BadRequestError: names the field, the id and the vocabulary size.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise BadRequestError(
                    f"{field} contains {token_id}; the base's vocabulary is 0 to {self.vocab_size - 1}.",
                    {"field": field},
                )

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt: TextPrompt | ChatPrompt) -> list[int]:
        if isinstance(prompt, TextPrompt):
            return self._tokenizer.encode(prompt.text, add_special_tokens=True)
        if not self._tokenizer.chat_template:
            raise BadRequestError("This base has no chat template; use prompt or token_ids.", {"field": "messages"})
        conversation = [{"role": role, "content": content} for role, content in prompt.messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates refuse by raising (roles that do not alternate, an unknown role), each in its own words.
            log.info("chat template refused messages", exc_info=error)
            roles = ", ".join(role for role, _ in prompt.messages)
            raise BadRequestError(
                f"The base's chat template refuses these messages (roles: {roles[:200]}). Many templates want user and "
                "assistant in turn, beginning with user, and at most one system message before.",
                {"field": "messages"},
            ) from error
        # The template has written the special tokens.
        return self._tokenizer.encode(text, add_special_tokens=False)


def _field(prompt: TextPrompt | ChatPrompt) -> str:
    return "prompt" if isinstance(prompt, TextPrompt) else "messages"
