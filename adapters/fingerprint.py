"""What is known about the base that adapters are checked against, beside its site table. Imports no torch.

An adapter that was trained for another base answers wrongly without failing, so it is refused. Three things tell:

- Shapes: every tensor is checked against the site it adapts (tensor_map.py). They refuse what does not fit, but
  fine-tunes of one model all have the same shapes.
- A hash in the adapter's card (card.py), where it carries one. It decides alone: the same hash is the same base under
  whatever name, another hash is another base under the same name.
- Names: the adapter's config says what it was trained for. A name proves something if it is public. The name of a
  directory proves nothing, neither the base's nor the adapter's: one that differs is reported, not refused.
"""

import re
from dataclasses import dataclass
from typing import Final

from .errors import AdapterIncompatibleError

# What quantized or converted copies of a model append to its name.
_COPY_SUFFIX: Final = re.compile(r"[-_.](unsloth|bnb|nf4|4bit|int4|bf16|fp16|hf|quantized)$")
# A hub id: `name` or `organisation/name`.
_PUBLIC: Final = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
# The directory in which the hub's cache keeps `organisation/name`.
_HUB_CACHE: Final = re.compile(r"[/\\]models--(?:[^/\\]+--)?(?P<name>[^/\\]+)")


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """The base as adapters may name it.

    Attributes:
        name: hub id or directory that the base was loaded from; empty when unknown.
        certain: whether `name` is the base's public name, so that an adapter for another name is one for another base;
            False for a directory's name.
        sha256: hex hash of the source checkpoint (server/base/base_hash.py); empty when unknown.
        also: other names that it goes by.
    """

    name: str = ""
    certain: bool = True
    sha256: str = ""
    also: tuple[str, ...] = ()

    def matches(self, trained_for: str | None) -> bool:
        """Whether `base_model_name_or_path` of an adapter may mean this base; unknown names match everything."""
        if not self.name or not trained_for:
            return True
        return _short(trained_for) in {_short(name) for name in (self.name, *self.also)}

    def check(self, trained_for: str | None, card_sha256: str | None, *, allow_other: bool) -> str | None:
        """Compare what an adapter says of its base with this one.

        Args:
            trained_for: name that its config gives, or None.
            card_sha256: hash that its card gives, or None.
            allow_other: accept another base, with a warning.

        Returns:
            A warning for the operator, or None if nothing speaks against it.

        Raises:
            AdapterIncompatibleError: it was trained for another base.
        """
        if card_sha256 and self.sha256:
            if card_sha256 == self.sha256:
                return None
            served = f" {_show(self.name)}" if self.name else ""
            found = (
                f"The adapter's card says that it was trained on a base with hash {card_sha256}; this server's base"
                f"{served} has hash {self.sha256}. (A 16-bit model and its 4-bit copy have different hashes.)"
            )
            is_proof, remedy = True, ""
        elif self.matches(trained_for):
            return None
        else:
            found = (
                f"The adapter says that it was trained for {_show(trained_for)}; this server's base is "
                f"{_show(self.name)}."
            )
            is_proof = self.certain and _PUBLIC.fullmatch(trained_for or "") is not None
            remedy = "; or, if that is another name of this base, give it with --base-names"
        if allow_other:
            return f"{found} That is allowed here."
        if not is_proof:
            return f"Shapes fit, but the names of the bases differ. {found}"
        raise AdapterIncompatibleError(
            f"{found} To serve it all the same, allow that for this load (allow_other_base) or for every adapter "
            f"(--adapter-allow-other-base){remedy}.",
            {"trained_for": (trained_for or "")[:256], "base": _short(self.name)[:256]},
        )

    def explain(self, trained_for: str | None) -> str:
        """A sentence for a message about shapes that do not fit; empty when the adapter does not name its base."""
        if not trained_for:
            return ""
        served = f"; this server's base is {_short(self.name)!r}" if self.name else ""
        return f" The adapter says that it was trained for {_short(trained_for)!r}{served}."


def is_public_name(name: str) -> bool:
    """Whether a name has the form `organisation/name`: no directory, as far as one can tell."""
    return "/" in name and _PUBLIC.fullmatch(name) is not None


def _show(name: str | None) -> str:
    """A hub id as it is; of a path, which may be this server's, the last component."""
    given = name or ""
    return repr(given[:256] if _PUBLIC.fullmatch(given) else _short(given)[:256])


def _short(name: str) -> str:
    """The last component of an id or path, lower case, without the suffixes of quantized copies."""
    cached = _HUB_CACHE.search(name)
    short = (cached["name"] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()
    while stripped := _COPY_SUFFIX.sub("", short):
        if stripped == short:
            break
        short = stripped
    return short
