"""What the files of an adapter's tokenizer say, read as transformers reads them. Runs in the tokenizer process."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer


class RefusedError(Exception):
    """What was given cannot be used; the message is for clients."""


def parse(data: bytes) -> Tokenizer:
    """A tokenizer of its JSON, without what a trainer had set for its batches: serving neither pads nor cuts."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except MemoryError:
        raise
    except Exception:
        raise RefusedError("is not one that `tokenizers` can read; is the copy complete?") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def digest_of(tokenizer: Tokenizer) -> str:
    """Identifies what a tokenizer does."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file's JSON object; empty without the file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RefusedError(f"has a {name} that is no JSON object")
    return value


def _content(value: object) -> str | None:
    """The text of a token that is written as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and so on -> token."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    tokens = {key: _content(value) for key, value in named.items() if key.endswith("_token")}
    return {key: token for key, token in tokens.items() if token is not None}


def template_of(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The chat template; of several named ones the default."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError:
            raise RefusedError("has a chat_template.jinja that is not UTF-8") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise RefusedError("has several chat templates and none of them is called 'default'")
    if template is not None and not isinstance(template, str):
        raise RefusedError("has a chat_template that is no text")
    return template


def added_tokens(tokenizer: Tokenizer) -> set[str]:
    """The tokens beside the model's vocabulary."""
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}


def named_tokens(files: Mapping[str, bytes], config: Mapping[str, Any], special: Mapping[str, str]) -> list[AddedToken]:
    """What transformers adds to a tokenizer.json that lacks it, in its order."""
    wanted: list[AddedToken] = []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        wanted += [_added_token(token) for _, token in sorted(decoder.items(), key=lambda item: _id(item[0]))]
    else:
        names = set(special.values())
        wanted += [
            AddedToken(token, special=token in names, normalized=token not in names)
            for token, _ in sorted(json_object(files, "added_tokens.json").items(), key=lambda item: _id(item[1]))
        ]
    wanted += [AddedToken(token, special=True) for token in special.values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key)
        contents = map(_content, extra if isinstance(extra, list) else [])
        wanted += [AddedToken(token, special=True) for token in contents if token is not None]
    return wanted


def _added_token(value: object) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content = _content(value)
    if not content or not isinstance(value, dict):
        raise RefusedError("has a tokenizer_config.json with a malformed added_tokens_decoder")
    return AddedToken(content, **{name: bool(value[name]) for name in flags if name in value})


def _id(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise RefusedError("names an added token with an id that is no number") from None


def eos_of(special_tokens: Mapping[str, str], token_to_id: Callable[[str], int | None]) -> list[int]:
    """The id of its end of sequence, if it names one."""
    token = special_tokens.get("eos_token")
    if token is None:
        return []
    index = token_to_id(token)
    if index is None:
        raise RefusedError(f"has the eos_token {token[:64]!r}, which is not in its vocabulary")
    return [index]


def has_regex(value: object) -> bool:
    """Whether there is a regular expression in a part of a tokenizer.json."""
    if isinstance(value, dict):
        return "Regex" in value or any(map(has_regex, value.values()))
    return isinstance(value, list) and any(map(has_regex, value))
