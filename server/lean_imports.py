"""Importing what a server consists of without what it does not need.

Three things that bitsandbytes and transformers bring in by the way take most of the time of their imports, and no step,
on no device, uses any of them:

- torch's compiler. Both decorate functions for it (`torch.compile`, `torch.compiler.disable`,
  `torch._dynamo.allow_in_graph`), and the first decorator loads it. Here decorators return functions as they are.
- torch's distributed tensors, and sympy with them: transformers is told that this torch has none, as some builds do.
- accelerate, and whatever else is installed that it looks for: transformers is told that it is not installed.

And transformers (5.17 to 5.23) goes through the source of all its models twice, line by line, to see what they define;
here once, and by searching.

What is asked of the compiler beside its decorators is answered by itself, loaded as ever. Modules that were there
before stay as they are, so whatever needs one of these (the preparation of the demo base) comes first. How much it is:
docs/performance.md, "Start, and idle".

Modules stay as long as the process, so nothing is collected while they come in, and later collections leave them out.
"""

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final
from unittest import mock

_COMPILER: Final = "torch._dynamo"
_SCANNER: Final = "transformers.utils.import_utils"
# What a module may call while it is imported.
_DECORATORS: Final = frozenset(("allow_in_graph", "assume_constant_result", "disable"))


@contextmanager
def lean_imports() -> Iterator[None]:
    """While this lasts, modules are imported lean and no garbage is collected.

    For one thread, at start.
    """
    gc.disable()
    try:
        import torch

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "compile", _as_it_is))
            stack.enter_context(mock.patch.object(torch.distributed, "is_available", lambda: False))
            for name, instead in (("accelerate", None), (_COMPILER, _Decorators())):
                if name not in sys.modules:
                    stack.callback(_remove, name, instead)
                    sys.modules[name] = instead  # type: ignore[assignment]  # None: "not to be found", see `import`
            finder = _QuickScan()
            sys.meta_path.insert(0, finder)
            stack.callback(sys.meta_path.remove, finder)
            yield
        gc.freeze()
    finally:
        gc.enable()


class _QuickScan(MetaPathFinder):
    """Finds transformers' module that looks at all models, and makes it quick; its answers are the same."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _SCANNER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_load_quick, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _load_quick(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    load(module)
    scan: Any = getattr(module, "create_import_structure_from_path", None)
    find: Any = getattr(module, "fetch__all__", None)
    if find is None or not hasattr(scan, "__wrapped__"):
        return

    def find_quickly(content: str) -> list[str]:
        """The names in the last line that begins with `__all__`, and in those after it."""
        begin = content.rfind("\n__all__") + 1
        names: list[str] = find(content[begin:])
        return names

    # Each folder once: transformers keeps 128 folders' answers, of 550, and asks for all of them twice.
    vars(module).update(create_import_structure_from_path=cache(scan.__wrapped__), fetch__all__=find_quickly)


def _remove(name: str, instead: ModuleType | None) -> None:
    """Forget a stand-in, unless what it stands for has come."""
    if name in sys.modules and sys.modules[name] is instead:
        del sys.modules[name]


def _as_it_is(function: Any = None, /, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that does nothing."""
    return _as_it_is if function is None else function


class _Decorators(ModuleType):
    """Stands for torch's compiler: its decorators do nothing, its submodules are its own, all else loads it."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        self.__spec__ = importlib.util.find_spec(_COMPILER)
        self.__path__ = list((self.__spec__ and self.__spec__.submodule_search_locations) or ())

    def __getattr__(self, name: str) -> Any:
        if name in _DECORATORS:
            return _as_it_is
        if name.startswith("__"):  # whoever goes through all modules looks for these
            raise AttributeError(name)
        _remove(_COMPILER, self)
        return getattr(importlib.import_module(_COMPILER), name)
