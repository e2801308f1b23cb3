"""Runs a kernel module on another library of C++ kernels than the one that this process chose, or on none."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lorikeet.kernels import attention_cpu, linear, lora_site, nf4_cpu
from lorikeet.kernels.native import functions

LIBRARIES = (*filter(functions.can_run, ("avx512", "avx2", "portable")), "none")
"""That this CPU can run."""
every_library = pytest.mark.parametrize("library", LIBRARIES)


def use_library(
    monkeypatch: pytest.MonkeyPatch, library: str, module: ModuleType, signatures: Mapping[str, tuple[Any, ...]]
) -> None:
    """Skips the test where there is no such library.

    Args:
        monkeypatch: undoes it.
        library: one of LIBRARIES.
        module: of `kernels`.
        signatures: the names in it that hold native functions -> what `functions.function` looks them up by.
    """
    path = None
    if library != "none":
        path = next(Path(functions.__file__).parent.glob(f"_{library}.*"), None)
        if path is None:
            pytest.skip(f"no library {library}")
    with monkeypatch.context() as lookup:
        lookup.setattr(functions, "_library_path", lambda: path)
        found = {name: functions.function(*signature, brief=True) for name, signature in signatures.items()}
    for name, native in found.items():
        monkeypatch.setattr(module, name, native)


def multiply_in_pairs(monkeypatch: pytest.MonkeyPatch, in_pairs: bool = True) -> None:
    """Multiplies bfloat16 as a CPU with AVX512-BF16 does, or as one without; on others the same source runs, without
    its instructions.
    """
    for module in (attention_cpu, linear, lora_site, nf4_cpu):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: in_pairs)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the environment asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
