"""Golden files as `lorikeet adapters golden` writes them, and adapters that were changed since."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lorikeet.adapters.golden import Golden, read_golden, write_golden
from lorikeet.adapters.inspection import inspect_directory
from lorikeet.server.golden_reference import encode, reference_logits

PROMPTS = ("In the beginning", "The quick brown fox jumps over the lazy dog", "parrot", "Lorikeets are small birds")


def digest_of(directory: Path) -> str:
    return inspect_directory(directory, None, check_golden=False).digest


def write_true_golden(directory: Path, base: Path, prompts: Sequence[Sequence[int]] = ()) -> Golden:
    """What PEFT answers, in float32 on the CPU."""
    prompts = prompts or encode(base, PROMPTS)
    logits = reference_logits(base, directory, prompts, progress=False).adapted
    golden = Golden(digest_of(directory), tuple(map(tuple, prompts)), logits, 0.2, "a test")
    write_golden(directory, golden)
    return golden


def golden_of(directory: Path) -> Golden:
    golden = read_golden(directory, digest=digest_of(directory))
    assert golden is not None
    return golden


def stamp(directory: Path, golden: Golden) -> None:
    """Pretend that a golden file was made for what the folder holds now: only its logits can tell."""
    write_golden(directory, dataclasses.replace(golden, digest=digest_of(directory)))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
