"""A process of its own for what strangers wrote: it parses and runs tokenizers and chat templates of adapters.

`tokenizer_client.py` starts it and bounds its time. It knows nothing of the server and imports no torch.

Why a process. A chat template is a program. Jinja's sandbox (transformers renders in an ImmutableSandboxedEnvironment,
and it is its own function that is called here) keeps it from files and from Python's internals, but not from loops in
loops, `9 ** (9 ** 9)` or a string of 10 GB. In the server each of these would stop every request, because Python cannot
be interrupted there. Parsing a tokenizer.json holds the interpreter lock, too: 0.3 s for the 3.5 MB of the demo base
(2-core AMD EPYC, 2026-11-22), in proportion to its size.

A message in either direction is a JSON object and any number of blobs: 8 bytes with the length of what follows, 8 bytes
with the length of the JSON, the JSON (its `blobs` are their lengths), the blobs.
"""

import json
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from .tokenizer_contents import (
    RefusedError,
    added_tokens,
    digest_of,
    eos_of,
    has_regex,
    json_object,
    named_tokens,
    parse,
    special_tokens_of,
    template_of,
)

MAX_MEMORY_BYTES: Final = 6 * 2**30
MAX_TEXT: Final = 32 * 2**20  # characters of a rendered conversation
# Of tokenizers that are kept built, as bytes of their JSON; at least one is kept.
BUILT_BYTES: Final = 96 * 2**20


class _Base:
    """The base's tokenizer, as far as others are compared with it."""

    def __init__(self, backends: Sequence[bytes]) -> None:
        built = [parse(data) for data in backends]
        self.digests = {digest_of(tokenizer) for tokenizer in built}
        self.token_to_id = built[0].token_to_id
        self.added = added_tokens(built[0])
        self.tokens = {index: token for token, index in built[0].get_vocab().items()}
        self.decoder = json.loads(built[0].to_str())["decoder"]


class Worker:
    """Answers one message after the other."""

    def __init__(self) -> None:
        self._base: _Base | None = None
        self._built: OrderedDict[str, tuple[Tokenizer, int]] = OrderedDict()

    def answer(self, message: Mapping[str, Any], blobs: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """The answer to a message: `base`, `examine`, `try` at load; `build`, `encode` for prompts.

        Raises:
            RefusedError: and whatever a template raises.
        """
        if message["do"] == "base":
            self._base = _Base([zlib.decompress(blob) for blob in blobs])
            _render("", {}, [("user", "")])  # imports what it needs
            return {}, []
        if message["do"] == "examine":
            files = dict(zip(message["names"], blobs, strict=True))
            return self._examine(files, message["limit"], is_base=message["is_base"])
        if message["do"] == "try":
            _try_template(message["template"], message["special_tokens"])
        elif message["do"] == "build":
            self._build(message["backend"], zlib.decompress(blobs[0]))
        else:
            return self._encode(message), []
        return {}, []

    def _build(self, key: str, data: bytes) -> None:
        self._built[key] = parse(data), len(data)
        while len(self._built) > 1 and sum(size for _, size in self._built.values()) > BUILT_BYTES:
            self._built.popitem(last=False)

    def _encode(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`text` of a conversation or, if `backend` names a tokenizer, `token_ids`; `need` asks to build that first."""
        key, text = message["backend"], message["text"]
        if key is not None and key not in self._built:
            return {"need": True}
        if text is None:
            text = _render(message["template"], message["special_tokens"], message["messages"])
        if key is None:
            return {"text": text}
        self._built.move_to_end(key)
        # A template has written the special tokens.
        encoding = self._built[key][0].encode(text, add_special_tokens=message["messages"] is None)
        return {"token_ids": encoding.ids}

    def _examine(self, files: Mapping[str, bytes], limit: int, *, is_base: bool) -> tuple[dict[str, Any], list[bytes]]:
        """What an adapter's files come to, beside the base.

        Args:
            files: name -> content.
            limit: ids are below it.
            is_base: the tokenizer.json was left out, since it is the base's; `need` asks for it.
        """
        assert self._base is not None, "the base comes first"
        config = json_object(files, "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # as transformers reads files of older versions
            config |= json_object(files, "special_tokens_map.json")
        special_tokens = special_tokens_of(config)
        template = template_of(files, config)
        answer: dict[str, Any] = {"special_tokens": special_tokens, "template": template, "backend": None}
        blobs: list[bytes] = []
        token_to_id = self._base.token_to_id
        if "tokenizer.json" in files:
            tokenizer = parse(files["tokenizer.json"])
            added = added_tokens(tokenizer)
            for token in named_tokens(files, config, special_tokens):
                if token.content not in added:
                    added.add(token.content)
                    tokenizer.add_tokens([token])
            token_to_id = tokenizer.token_to_id
            digest = digest_of(tokenizer)
            if digest not in self._base.digests:
                answer["backend"] = digest
                answer |= self._compare(tokenizer, limit)
                blobs = [zlib.compress(tokenizer.to_str().encode(), 1)]
        elif is_base and any(
            token.content not in self._base.added for token in named_tokens(files, config, special_tokens)
        ):
            return {"need": True}, []
        answer["eos"] = eos_of(special_tokens, token_to_id)
        return answer, blobs

    def _compare(self, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
        """How it turns ids into text, where the base does not do just the same."""
        assert self._base is not None
        base, own = self._base.tokens, {index: token for token, index in tokenizer.get_vocab().items()}
        changed = {index: token for index, token in own.items() if base.get(index) != token}
        # Bases exist whose own tokenizer knows ids that the model has no row for; those are nobody's fault here.
        beyond = sorted(index for index in changed if index >= limit)
        if beyond:
            raise RefusedError(
                f"gives {own[beyond[0]][:64]!r} the id {beyond[0]}, and {len(beyond) - 1} more ids lie beyond the "
                f"adapter's vocabulary, which is 0 to {limit - 1}. Was the adapter saved without the rows of its new "
                "tokens? Save it with modules_to_save or trainable_token_indices, or the tokenizer that it was trained "
                "with"
            )
        decoder = json.loads(tokenizer.to_str())["decoder"]
        if decoder != self._base.decoder and has_regex(decoder):
            raise RefusedError("has a decoder with a regular expression, which is not run for strangers")
        return {
            "changed": {**changed, **{index: None for index in base if index not in own}},
            "special": sorted(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special),
            "decoder": json.dumps(decoder),
        }


def _render(template: str, special_tokens: Mapping[str, str], messages: Sequence[tuple[str, str]]) -> str:
    # Late, for the server imports this module, too.
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": role, "content": content} for role, content in messages]
    names: dict[str, Any] = dict(special_tokens)
    answer = render_jinja_template(  # a pair, whatever its annotation says: the texts come first
        conversations=[conversation], chat_template=template, add_generation_prompt=True, **names
    )
    text = answer[0][0]
    if len(text) > MAX_TEXT:
        raise RefusedError(f"wrote {len(text)} characters; at most {MAX_TEXT} are accepted")
    return text


def _try_template(template: str, special_tokens: Mapping[str, str]) -> None:
    """Refuse a template that is no template, or does what the sandbox forbids; it may refuse our messages."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        _render(template, special_tokens, [("user", "Hello")])
    except TemplateSyntaxError as error:
        raise RefusedError(f"has a chat template that is not valid in line {error.lineno}") from None
    except SecurityError:
        raise RefusedError("has a chat template that does what templates may not do") from None
    except (MemoryError, RecursionError, OverflowError):
        raise RefusedError("has a chat template that takes too much memory for one word") from None
    except RefusedError as error:
        raise RefusedError(f"has a chat template that {error}") from None
    except Exception:
        return  # in its own words: it may want other roles, or tools


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, min(size - len(data), 2**20))
        if not chunk:
            raise SystemExit(0)  # the server is gone
        data += chunk
    return bytes(data)


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """A message from what follows its length."""
    start = 8 + int.from_bytes(data[:8], "little")
    message = json.loads(data[8:start])
    blobs = []
    for size in message["blobs"]:
        blobs.append(data[start : start + size])
        start += size
    return message, blobs


def pack(message: Mapping[str, Any], blobs: Sequence[bytes]) -> bytes:
    """A message with its length."""
    text = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    body = b"".join([len(text).to_bytes(8, "little"), text, *blobs])
    return len(body).to_bytes(8, "little") + body


def main() -> None:
    """Answer messages on standard input and output until the server closes them."""
    source, target = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # nothing that a library prints may get between the messages
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    worker = Worker()
    while True:
        message, blobs = unpack(_read(source, int.from_bytes(_read(source, 8), "little")))
        # Also of a process that has lost its server.
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + message["cpu_seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            answer, answered = worker.answer(message, blobs)
        except RefusedError as error:
            answer, answered = {"refused": str(error)}, []
        except MemoryError:
            answer, answered = {"exhausted": True}, []
        except Exception:
            answer, answered = {"failed": True}, []
        data = pack(answer, answered)
        while data:
            data = data[os.write(target, data) :]


if __name__ == "__main__":
    main()
