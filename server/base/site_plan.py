"""Which linears of a model become which sites, and the buffers that their parts are written into."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...adapters.sites import Site, Slice
from ...kernels.nf4 import prepare_for_device
from ...kernels.nf4_weight import BLOCK, Absmax, NF4Weight, stack_absmax
from ..errors import BaseModelError
from .linears import NF4Linear, SliceLinear, StackedLinear

# Linears of one parent module that read the same input, and the name of the stack. Order is the order of the outputs.
STACKS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(slots=True)
class SitePlan:
    """One site while its parts arrive: device buffers that each part is written into.

    Block constants are kept in the form in which the parts have them, and stacked when all have come.
    """

    parent: str
    name: str
    layer: int
    parts: list[str]
    widths: list[int]
    in_features: int
    has_bias: bool
    codes: Tensor | None = None
    absmax: Absmax | None = None
    bias: Tensor | None = None
    missing: set[str] = field(default_factory=set)
    absmax_parts: dict[str, Absmax] = field(default_factory=dict)

    def span(self, part: str) -> tuple[int, int]:
        """Rows [start, stop) of one part in the stack."""
        i = self.parts.index(part)
        start = sum(self.widths[:i])
        return start, start + self.widths[i]

    def add_absmax(self, part: str, absmax: Absmax) -> None:
        """Take the block constants of one part."""
        self.absmax_parts[part] = absmax
        if len(self.absmax_parts) == len(self.parts):
            self.absmax = stack_absmax([self.absmax_parts.pop(part) for part in self.parts])


def plan_sites(model: nn.Module) -> list[SitePlan]:
    """Group every linear of the decoder layers into sites, in module order.

    Raises:
        BaseModelError: a linear whose rows do not divide into NF4 blocks.
    """
    linears: dict[str, dict[str, nn.Linear]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, leaf = name.rpartition(".")
            linears[parent][leaf] = module
    plans: list[SitePlan] = []
    for parent, children in linears.items():
        layer = int(parent.split(".layers.")[1].split(".")[0])
        left = dict(children)
        for stack, leaves in STACKS.items():
            if all(leaf in left and left[leaf].in_features == left[leaves[0]].in_features for leaf in leaves):
                plans.append(_plan(parent, stack, layer, {leaf: left.pop(leaf) for leaf in leaves}))
        plans.extend(_plan(parent, leaf, layer, {leaf: linear}) for leaf, linear in left.items())
    if not plans:
        raise BaseModelError("The base model has no decoder layers with linears that could be held in NF4.")
    return plans


def _plan(parent: str, name: str, layer: int, parts: dict[str, nn.Linear]) -> SitePlan:
    in_features = next(iter(parts.values())).in_features
    for leaf, linear in parts.items():
        if in_features % BLOCK:
            raise BaseModelError(
                f"{parent}.{leaf} has {in_features} input features; NF4 rows need a multiple of {BLOCK}."
            )
        if linear.in_features != in_features:
            raise BaseModelError(f"{parent}.{leaf} does not read the same input as the linears it is stacked with.")
    has_bias = any(linear.bias is not None for linear in parts.values())
    missing = {f"{parent}.{leaf}.weight" for leaf in parts}
    missing |= {f"{parent}.{leaf}.bias" for leaf, linear in parts.items() if linear.bias is not None}
    return SitePlan(
        parent, name, layer, list(parts), [p.out_features for p in parts.values()], in_features, has_bias,
        missing=missing,
    )  # fmt: skip


def install_sites(model: nn.Module, plans: list[SitePlan], dtype: torch.dtype) -> list[Site]:
    """Put the NF4 linears into the module tree and describe them as sites."""
    for plan in plans:
        assert plan.codes is not None and plan.absmax is not None
        weight = prepare_for_device(NF4Weight(plan.codes, plan.absmax, sum(plan.widths), plan.in_features), dtype)
        plan.codes = plan.absmax = None  # a CPU has repacked them
        linear: nn.Module = NF4Linear(weight, plan.bias if plan.has_bias else None)
        parent = model.get_submodule(plan.parent)
        if len(plan.parts) > 1:
            stack = StackedLinear(linear, plan.widths)
            setattr(parent, plan.name, stack)
            for i, leaf in enumerate(plan.parts):
                setattr(parent, leaf, SliceLinear(stack, i))
        else:
            setattr(parent, plan.parts[0], linear)
    return describe_sites(model, plans)


def describe_sites(model: nn.Module, plans: list[SitePlan]) -> list[Site]:
    """The sites that the plans come to, and the output head as the last one; needs no weights.

    Raises:
        BaseModelError: the model's output head is no linear.
    """
    sites: list[Site] = []
    for index, plan in enumerate(plans):
        slices = tuple(
            Slice(f"{plan.parent}.{leaf}", width) for leaf, width in zip(plan.parts, plan.widths, strict=True)
        )
        sites.append(Site(index, f"{plan.parent}.{plan.name}", plan.layer, plan.in_features, slices))
    path, head = find_head(model)
    sites.append(Site(len(sites), path, -1, head.in_features, (Slice(path, head.out_features),), is_head=True))
    return sites


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """(path, module) of the output head.

    Raises:
        BaseModelError: it has none, or it is no linear.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in model.named_modules(remove_duplicate=False):
        if module is head and isinstance(module, nn.Linear):
            return path, module
    raise BaseModelError("The base model has no output head that is a linear (lm_head).")
