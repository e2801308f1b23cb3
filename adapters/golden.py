"""The golden file of an adapter: a few prompts, and the logits that a correct server computes for them.

`lorikeet.golden.safetensors` in the adapter's folder, written by `lorikeet adapters golden` with transformers,
bitsandbytes and PEFT in float32, none of Lorikeet's code between. At load the server replays it (server/proof.py) and
refuses an adapter whose logits are off. It proves what checking files cannot: that this base, this quantization, this
scaling and these kernels together answer as PEFT does.

Content: `token_ids` int32 [total], the prompts one behind the other; `lengths` int32 [P]; `logits` float32 or float16
[P, V], of the last position of each prompt with the adapter. Metadata, all strings: `format`, `adapter_sha256` (the
version it belongs to), `tolerance`, `made_by`, `base_model`, `base_model_sha256` (both may be empty).
"""

import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import AdapterInvalidError, AdapterUnreadableError
from .paths import open_contained

GOLDEN_FILE: Final = "lorikeet.golden.safetensors"
FORMAT: Final = "lorikeet golden 1"
DEFAULT_TOLERANCE: Final = 0.2
MAX_TOLERANCE: Final = 10.0

# A file is read whole, so its size bounds the memory that reading it takes.
MAX_GOLDEN_BYTES: Final = 64 * 2**20
MAX_PROMPTS: Final = 64
MAX_PROMPT_TOKENS: Final = 1024
_MAX_HEADER_BYTES: Final = 64 * 2**10
_MAX_TEXT: Final = 256

_HEX_DIGITS: Final = re.compile(r"[0-9a-f]{64}")
_AGAIN: Final = "Make it again with `lorikeet adapters golden`, or remove it"


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A checked golden file.

    Attributes:
        digest: of the adapter version that it belongs to.
        prompts: token ids, each at least one, all below the width of `logits`.
        logits: [P, V], float32 or float16, CPU, finite: of each prompt's last position with the adapter.
        tolerance: largest difference that is accepted of 16-bit computing.
        made_by: which software, for people.
        base_model: name of the base that it was made on; may be empty.
        base_model_sha256: its hash; may be empty.
    """

    digest: str
    prompts: tuple[tuple[int, ...], ...]
    logits: Tensor
    tolerance: float
    made_by: str
    base_model: str = ""
    base_model_sha256: str = ""

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return self.logits.shape[1]


def read_golden(
    directory: Path,
    roots: Sequence[Path] = (),
    *,
    digest: str,
    vocab_size: int | None = None,
    max_bytes: int = MAX_GOLDEN_BYTES,
) -> Golden | None:
    """Read and check the golden file of an adapter directory.

    Args:
        directory: real path.
        roots: the file must really lie in one of them; empty when a local tool asks.
        digest: of the adapter in that directory.
        vocab_size: of the base; None: it is compared when the file is replayed.
        max_bytes: refuse a larger file before reading it.

    Returns:
        None: there is no such file.

    Raises:
        AdapterInvalidError: malformed, too large, or it belongs to another version of the adapter or another base.
        AdapterUnreadableError: the disk failed.
    """
    if not os.path.lexists(directory / GOLDEN_FILE):
        return None
    with open_contained(directory, GOLDEN_FILE, roots) as file:
        golden = parse_golden(_read(file, max_bytes))
    if golden.digest != digest:
        raise _invalid(
            f"belongs to version {golden.digest[:12]} of the adapter, but the folder holds {digest[:12]}. {_AGAIN}"
        )
    if vocab_size is not None and golden.vocab_size != vocab_size:
        raise wrong_vocabulary(golden, vocab_size)
    return golden


def parse_golden(data: bytes | bytearray) -> Golden:
    """Parse the content of a golden file.

    Raises:
        AdapterInvalidError: malformed; says what.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    try:
        tensors = load(bytes(data)) if header_bytes <= _MAX_HEADER_BYTES else {}
    except (SafetensorError, KeyError):  # KeyError: a type that torch does not have
        tensors = {}
    if not tensors:
        raise _invalid("is not a safetensors file, or not a complete one")
    metadata = json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise _invalid(f"is of format {str(metadata.get('format'))[:40]!r}; {FORMAT!r} is read")
    if tensors.keys() != {"token_ids", "lengths", "logits"}:
        raise _invalid("must hold the tensors token_ids, lengths and logits, and no other")
    num_prompts = _checked(tensors, "lengths", (torch.int32,), 1).numel()
    lengths: list[int] = tensors["lengths"][: MAX_PROMPTS + 1].tolist()
    if num_prompts > MAX_PROMPTS or not all(1 <= n <= MAX_PROMPT_TOKENS for n in lengths):
        raise _invalid(f"must hold 1 to {MAX_PROMPTS} prompts of 1 to {MAX_PROMPT_TOKENS} tokens")
    num_tokens = _checked(tensors, "token_ids", (torch.int32,), 1).numel()
    if num_tokens != sum(lengths):
        raise _invalid(f"has {num_tokens} token ids, but its lengths add up to {sum(lengths)}")
    token_ids: list[int] = tensors["token_ids"].tolist()
    logits = _checked(tensors, "logits", (torch.float32, torch.float16), 2)
    if logits.shape[0] != num_prompts:
        raise _invalid(f"has {num_prompts} prompts, but logits for {logits.shape[0]}")
    if not all(0 <= token < logits.shape[1] for token in token_ids):
        raise _invalid(f"has a token id outside its vocabulary of {logits.shape[1]}")
    if not torch.isfinite(logits).all():
        raise _invalid("has logits that are not finite (NaN or infinity)")
    ends = list(itertools.accumulate(lengths))
    return Golden(
        digest=_hash(metadata, "adapter_sha256"),
        prompts=tuple(tuple(token_ids[end - n : end]) for n, end in zip(lengths, ends, strict=True)),
        logits=logits,
        tolerance=_tolerance(metadata),
        made_by=_text(metadata, "made_by"),
        base_model=_text(metadata, "base_model"),
        base_model_sha256=_hash(metadata, "base_model_sha256", may_be_empty=True),
    )


def serialize_golden(golden: Golden) -> bytes:
    """The content of its file."""
    metadata = {
        "format": FORMAT,
        "adapter_sha256": golden.digest,
        "tolerance": repr(golden.tolerance),
        "made_by": golden.made_by[:_MAX_TEXT],
        "base_model": golden.base_model[:_MAX_TEXT],
        "base_model_sha256": golden.base_model_sha256,
    }
    tensors = {
        "token_ids": torch.tensor([token for prompt in golden.prompts for token in prompt], dtype=torch.int32),
        "lengths": torch.tensor([len(prompt) for prompt in golden.prompts], dtype=torch.int32),
        "logits": golden.logits.contiguous(),
    }
    return save(tensors, metadata)


def write_golden(directory: Path, golden: Golden) -> Path:
    """Write an adapter's golden file; it appears whole or not at all, in place of an earlier one.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / GOLDEN_FILE
    temporary = directory / f".{GOLDEN_FILE}.{secrets.token_hex(4)}"
    try:
        with temporary.open("wb") as file:
            file.write(serialize_golden(golden))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def wrong_vocabulary(golden: Golden, vocab_size: int) -> AdapterInvalidError:
    """The error for a golden file that was made on a base of another vocabulary."""
    made_on = f" ({golden.base_model})" if golden.base_model else ""
    return _invalid(
        f"has logits for a vocabulary of {golden.vocab_size}; here it is {vocab_size}: it was made on another "
        f"base{made_on}. {_AGAIN}"
    )


def _read(file: BinaryIO, max_bytes: int) -> bytes:
    """All of an unbuffered file, which may return less than it was asked for."""
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise _invalid(f"has {size} bytes; at most {max_bytes} are read")
    data = bytearray()
    try:
        while chunk := file.read(max_bytes + 1 - len(data)):
            data += chunk
    except OSError:
        raise AdapterUnreadableError(f"{GOLDEN_FILE} cannot be read.", {"file": GOLDEN_FILE}) from None
    return bytes(data)


def _checked(tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], dims: int) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype not in dtypes or tensor.dim() != dims or not tensor.numel():
        raise _invalid(
            f"has {name} of type {tensor.dtype} and shape {str(list(tensor.shape))[:80]}; it must be "
            f"{' or '.join(map(str, dtypes))} of {dims} dimension{'s'[: dims > 1]}, not empty"
        )
    return tensor


def _tolerance(metadata: Mapping[str, str]) -> float:
    text = _text(metadata, "tolerance")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_TOLERANCE:
        raise _invalid(f"has the tolerance {text[:40]!r}; allowed: above 0 to {MAX_TOLERANCE:g}")
    return value


def _hash(metadata: Mapping[str, str], key: str, *, may_be_empty: bool = False) -> str:
    value = _text(metadata, key)
    if not (_HEX_DIGITS.fullmatch(value) or (may_be_empty and not value)):
        raise _invalid(f"has {key} {value[:80]!r}; it must be 64 hex digits")
    return value


def _text(metadata: Mapping[str, str], key: str) -> str:
    value = metadata.get(key, "")
    if len(value) > _MAX_TEXT:
        raise _invalid(f"has a {key} of {len(value)} characters; at most {_MAX_TEXT} are read")
    return value


def _invalid(what: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{GOLDEN_FILE} {what}.", {"file": GOLDEN_FILE})
