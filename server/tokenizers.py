"""Adapters' own tokenizers: what they do otherwise than the base's, and how their prompts and answers are tokenized.

Nothing that an adapter's author wrote is parsed or run in the server's process. `tokenizer_process.py` compares files
with the base's, renders chat templates and turns text into ids: two such processes serve requests and a third loads, so
neither a template that does not end nor a broken file is felt by anybody else. Ids become text here, on the step
thread, by a table of the tokens that the base does not have and the decoder. A tokenizer that does the same as the
base's is dropped when it is loaded, and costs nothing.

What holds for a chat template: RENDER_S seconds and its process's memory for one prompt, then the process is killed and
the request refused; one prompt of a tokenizer at a time; tokenizers that wait take turns.
"""

import asyncio
import hashlib
import json
import queue
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from tokenizers import Tokenizer

from ..adapters.adapter_tokenizer import AdapterTokenizer, AdapterVocabulary, Detokenization
from ..adapters.errors import AdapterInvalidError, AdapterMemoryError
from ..adapters.tokenizer_files import TOKENIZER_FILE, TokenizerFiles
from .engine.own_decoder import make_decode
from .engine.token_rules import TokenRules
from .errors import BadRequestError
from .tokenizer_client import LateError, TokenizerProcess

# Of one prompt; generous, for prompts of a million tokens and busy machines.
RENDER_S: Final = 10.0
LOAD_S: Final = 120.0
REQUEST_PROCESSES: Final = 2
# Of all tokenizers that differ from the base's, each counted once, however many adapters share it.
MAX_KEPT_BYTES: Final = 512 * 2**20


class Tokenizers:
    """The tokenizers of one server's adapters.

    Args:
        base: the base's tokenizer, of transformers.
        decoder: a copy of its backend that nothing changes.
        eos_token_ids: the base's.
        vocab_size: rows of the base's embedding.
        render_s: longest time for one prompt.
        max_kept_bytes: host memory of tokenizers that differ from the base's.
    """

    def __init__(
        self,
        base: Any,
        decoder: Tokenizer,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        *,
        render_s: float = RENDER_S,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._render_s = render_s
        self._max_kept_bytes = max_kept_bytes
        self._template: str | None = base.chat_template
        self._special_tokens = {key: str(token) for key, token in base.special_tokens_map.items()}
        stored = Path(base.name_or_path) / TOKENIZER_FILE
        self._stored = [stored.read_bytes()] if stored.is_file() else []
        self._loading = TokenizerProcess(lambda: self._packed)
        self._processes = [TokenizerProcess(lambda: self._packed) for _ in range(REQUEST_PROCESSES)]
        self._free: queue.SimpleQueue[TokenizerProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._executor = ThreadPoolExecutor(REQUEST_PROCESSES, thread_name_prefix="tokenize-own")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._kept: WeakValueDictionary[str, AdapterTokenizer] = WeakValueDictionary()
        self._keeping = threading.Lock()
        self._is_warm = False

    # The base's tokenizer.json, as it runs and as it lay on the disk at start. Made when the first adapter brings a
    # tokenizer: few do, and a server would be ready 0.1 s later.

    @cached_property
    def _backends(self) -> list[bytes]:
        return [self._decoder.to_str().encode(), *self._stored]

    @cached_property
    def _same_bytes(self) -> frozenset[bytes]:
        return frozenset(hashlib.sha256(data).digest() for data in self._backends)

    @cached_property
    def _packed(self) -> list[bytes]:
        return [zlib.compress(data, 1) for data in self._backends]

    def close(self) -> None:
        """End the processes; whoever waits for one gets an error."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in (self._loading, *self._processes):
            process.close()

    # For the adapter manager's loader threads.

    def make(self, files: TokenizerFiles, vocab_size: int | None) -> AdapterTokenizer | None:
        """The `make_tokenizer` of the adapter manager.

        Args:
            files: what the adapter ships.
            vocab_size: token ids that the adapter knows are below it; None: as many as the base has.

        Returns:
            None: the base's tokenizer does just the same.

        Raises:
            AdapterInvalidError: no tokenizer can be made of the files, or its ids go beyond the vocabulary.
            AdapterMemoryError: there are too many different tokenizers.
        """
        if not files.files:
            return None
        found, blobs = self._examine(files.files, self._vocab_size if vocab_size is None else vocab_size)
        template, special_tokens = found["template"], found["special_tokens"]
        if template is None or (template == self._template and not self._has_other_tokens(template, special_tokens)):
            template, special_tokens = None, {}
        eos_token_ids, backend_digest = frozenset(found["eos"]), found["backend"]
        if backend_digest is None and template is None and eos_token_ids <= self._eos_token_ids:
            return None
        detokenization = None
        if backend_digest is not None:
            changed = {int(index): token for index, token in found["changed"].items()}
            detokenization = Detokenization(changed, frozenset(found["special"]), found["decoder"])
        key = [backend_digest, template, sorted(special_tokens.items()), sorted(eos_token_ids)]
        return self._keep(
            AdapterTokenizer(
                digest=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
                backend=blobs[0] if blobs else None,
                backend_digest=backend_digest,
                detokenization=detokenization,
                template=template,
                special_tokens=special_tokens,
                eos_token_ids=eos_token_ids,
            )
        )

    def _examine(self, files: Mapping[str, bytes], limit: int) -> tuple[dict[str, Any], list[bytes]]:
        """What files come to, found out in another process."""
        rest = dict(files)
        is_base = TOKENIZER_FILE in rest and hashlib.sha256(rest[TOKENIZER_FILE]).digest() in self._same_bytes
        if is_base:
            del rest[TOKENIZER_FILE]  # nothing to parse, as a rule
        message = {"do": "examine", "names": list(rest), "limit": limit, "is_base": is_base}
        try:
            found, blobs = self._loading.ask(message, list(rest.values()), LOAD_S)
            if found.get("need"):
                message |= {"names": list(files), "is_base": False}
                found, blobs = self._loading.ask(message, list(files.values()), LOAD_S)
            if found.get("template") is not None:
                trial = {"do": "try", "template": found["template"], "special_tokens": found["special_tokens"]}
                # Loading has the lowest priority: what it takes is measured by the processor's time.
                found |= self._loading.ask(trial, (), LOAD_S, self._render_s)[0]
        except LateError:
            raise AdapterInvalidError(
                "The adapter's tokenizer or chat template takes too long or too much memory. Save the base's beside "
                "the adapter, or none.",
                {"file": TOKENIZER_FILE},
            ) from None
        if "refused" in found or "failed" in found:
            reason = found.get("refused", "is not a tokenizer as transformers saves it")
            raise AdapterInvalidError(f"The adapter's tokenizer {reason}.", {"file": TOKENIZER_FILE})
        return found, blobs

    def _keep(self, tokenizer: AdapterTokenizer) -> AdapterTokenizer:
        """The tokenizer, or an equal one that is there already."""
        with self._keeping:
            known = self._kept.get(tokenizer.digest)
            if known is not None:
                return known
            others = list(self._kept.values())
            used = sum(kept.nbytes for kept in others)
            twin = next((kept for kept in others if kept.backend_digest == tokenizer.backend_digest), None)
            if twin is not None:  # another template for the same tokens
                tokenizer = replace(tokenizer, backend=twin.backend, detokenization=twin.detokenization)
            if used + tokenizer.nbytes > self._max_kept_bytes:
                raise AdapterMemoryError(
                    f"The adapter's tokenizer takes {tokenizer.nbytes} bytes; tokenizers that differ from the base's "
                    f"have {self._max_kept_bytes} bytes together, of which {used} are used. Unload adapters, or save "
                    "this one with the base's tokenizer."
                )
            self._kept[tokenizer.digest] = tokenizer
            if not self._is_warm:
                self._is_warm = True
                for _ in self._processes:
                    self._executor.submit(self._warm)
        return tokenizer

    def _has_other_tokens(self, template: str, special_tokens: dict[str, str]) -> bool:
        """Whether a template writes special tokens that are not the base's; a pad token, say, it hardly ever does."""
        names = {*special_tokens, *self._special_tokens}
        return any(special_tokens.get(name) != self._special_tokens.get(name) for name in names if name in template)

    # For requests.

    def rules(self, vocabulary: AdapterVocabulary) -> TokenRules | None:
        """What the engine needs to know of a request's tokens; None: they are the base's."""
        tokenizer = vocabulary.tokenizer
        if tokenizer is None:
            return None
        how = tokenizer.detokenization
        return TokenRules(
            None if how is None else make_decode(how, self._decoder), self._eos_token_ids | tokenizer.eos_token_ids
        )

    async def encode(
        self, tokenizer: AdapterTokenizer, text: str | None, messages: tuple[tuple[str, str], ...] | None
    ) -> str | list[int]:
        """Token ids of a text or of a conversation; or the conversation's text, where the base's tokenizer goes on.

        Args:
            tokenizer: has a backend or a template, or both.
            text: what is to be tokenized; None: what the template makes of the messages.
            messages: (role, content) in order; beside a text: the text was made of them.

        Raises:
            BadRequestError: the template refuses the messages, or it takes too long.
        """
        turn = self._turns.setdefault(tokenizer.digest, asyncio.Lock())
        await turn.acquire()
        loop = asyncio.get_running_loop()

        def give_back(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(turn.release)

        try:
            future = self._executor.submit(self._encode, tokenizer, text, messages)
        except BaseException:
            turn.release()
            raise
        # On its thread, as late as it ends: a client that has left leaves its turn no earlier.
        future.add_done_callback(give_back)
        return await asyncio.wrap_future(future)

    def _encode(
        self, tokenizer: AdapterTokenizer, text: str | None, messages: tuple[tuple[str, str], ...] | None
    ) -> str | list[int]:
        field = "prompt" if messages is None else "messages"
        message = {
            "do": "encode",
            "text": text,
            "template": tokenizer.template,
            "special_tokens": dict(tokenizer.special_tokens),
            "messages": messages,
            "backend": tokenizer.backend_digest,
        }
        process = self._free.get()
        try:
            answer, _ = process.ask(message, (), self._render_s)
            if answer.get("need"):
                assert tokenizer.backend is not None
                process.ask({"do": "build", "backend": tokenizer.backend_digest}, (tokenizer.backend,), LOAD_S)
                answer, _ = process.ask(message, (), self._render_s)
        except LateError:
            what = "chat template" if text is None else "tokenizer"
            raise BadRequestError(
                f"The adapter's {what} took more than {self._render_s:g} s, or too much memory, for this prompt. Use a "
                "shorter one, or token_ids.",
                {"field": field},
            ) from None
        finally:
            self._free.put(process)
        if "refused" in answer or "failed" in answer:
            if text is None:
                raise refusal("The adapter's", messages or ())
            raise BadRequestError("The adapter's tokenizer cannot read this prompt.", {"field": field})
        result: str | list[int] = answer["text"] if tokenizer.backend is None else answer["token_ids"]
        return result

    def _warm(self) -> None:
        """Start a process before the first prompt comes."""
        process = self._free.get()
        try:
            with suppress(LateError):  # logged there, or the server ends
                process.start()
        finally:
            self._free.put(process)


def refusal(whose: str, messages: Sequence[tuple[str, str]]) -> BadRequestError:
    """The error for messages that a chat template refuses."""
    roles = ", ".join(role for role, _ in messages)
    return BadRequestError(
        f"{whose} chat template refuses these messages (roles: {roles[:200]}). Many templates want user and "
        "assistant in turn, beginning with user, and at most one system message before.",
        {"field": "messages"},
    )
