"""What is known about the base that adapters are checked against, beside its site table. Imports no torch.

Shapes decide whether an adapter fits: every tensor is checked against the site it adapts. The name in the adapter's
config cannot decide, because a base is as often called by a local path or by a quantized copy's name as by the id it
was trained under. A name that differs is therefore reported, never refused; when shapes do not fit, the message tells
both names.
"""

import re
from dataclasses import dataclass

# What quantized or converted copies of a model append to its name.
_COPY_SUFFIX = re.compile(r"[-_.](unsloth|bnb|nf4|4bit|int4|bf16|fp16|hf|quantized)$")


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """The base as adapters may name it.

    Attributes:
        name: hub id or directory that the base was loaded from; empty when unknown.
    """

    name: str = ""

    def matches(self, trained_for: str | None) -> bool:
        """Whether `base_model_name_or_path` of an adapter may mean this base; unknown names match everything."""
        if not self.name or not trained_for:
            return True
        return _short(self.name) == _short(trained_for)

    def explain(self, trained_for: str | None) -> str:
        """A sentence for a message about shapes that do not fit; empty when the adapter does not name its base."""
        if not trained_for:
            return ""
        served = f"; this server's base is {_short(self.name)!r}" if self.name else ""
        return f" The adapter says that it was trained for {_short(trained_for)!r}{served}."


def _short(name: str) -> str:
    """The last component of an id or path, lower case, without the suffixes of quantized copies."""
    short = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    while stripped := _COPY_SUFFIX.sub("", short):
        if stripped == short:
            break
        short = stripped
    return short
