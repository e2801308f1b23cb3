"""Importing what a server consists of without what it does not need.

Three things that bitsandbytes and transformers bring in by the way take most of the time of their imports, and no step,
on no device, uses any of them:

- torch's compiler. Both decorate functions for it (`torch.compile`, `torch.compiler.disable`,
  `torch._dynamo.allow_in_graph`), and the first decorator loads it. Here decorators return functions as they are.
- torch's distributed tensors, and sympy with them: transformers is told that this torch has none, as some builds do.
- accelerate, and whatever else is installed that it looks for: transformers is told that it is not installed. So is
  bitsandbytes of Triton where there is no GPU to compile for.

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
            for owner, name, instead in (
                (torch, "compile", _as_it_is),
                (torch.distributed, "is_available", lambda: False),
            ):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, instead)
            if not torch.cuda.is_available():
                stack.enter_context(stand_in("triton", None))
            stack.enter_context(stand_in("accelerate", None))
            stack.enter_context(stand_in(_COMPILER, _Decorators()))
            finder = _QuickScan()
            sys.meta_path.insert(0, finder)
            stack.callback(sys.meta_path.remove, finder)
            yield
        gc.freeze()
    finally:
        gc.enable()


@contextmanager
def stand_in(name: str, module: ModuleType | None) -> Iterator[None]:
    """While this lasts, a module that has not come yet is another.

    Args:
        name: of the module.
        module: in its place; None: it is not to be found.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module  # type: ignore[assignment]  # None: see `import`
    try:
        yield
    finally:
        _remove(name, module)


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
