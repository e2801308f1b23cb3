"""Describes what a model has beside its linears: the embedding and norms, whose parameters adapters may replace."""

from torch import nn

from ...adapters.modules import Module, ModuleKind, ModuleTable
from ..errors import BaseModelError
from .fill import tied_names
from .site_plan import find_head

_NORM_PARAMETERS = frozenset(("weight", "bias"))


def describe_modules(model: nn.Module) -> ModuleTable:
    """The modules of a model that are no sites; needs no weights.

    Raises:
        BaseModelError: the input embedding is no table of rows, or the output head is no linear.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    by_path: dict[str, Module] = {}
    embedding_path = None
    for path, module in model.named_modules():
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
        if module is embedding and shapes.keys() == {"weight"}:
            embedding_path = path
            by_path[path] = Module(path, ModuleKind.EMBEDDING, shapes)
        elif _is_norm(module, shapes):
            by_path[path] = Module(path, ModuleKind.NORM, shapes)
    if embedding_path is None:
        raise BaseModelError("The base model has no input embedding that is one table of rows.")
    head, linear = find_head(model)
    return ModuleTable(
        by_path=by_path,
        embedding=embedding_path,
        head=head,
        is_tied=f"{head}.weight" in tied_names(model),
        vocab_size=linear.out_features,
        embedding_scale=float(getattr(embedding, "embed_scale", 1.0)),
    )


def _is_norm(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a module only scales and shifts the features of each row."""
    is_leaf = next(module.children(), None) is None
    vectors = bool(shapes) and shapes.keys() <= _NORM_PARAMETERS and all(len(shape) == 1 for shape in shapes.values())
    return is_leaf and vectors and not isinstance(module, nn.Linear)
