"""What adapters can change in a base: every parameter of it is a site's or a module's, the head is the last site."""

from pathlib import Path

import pytest
import torch
from lorikeet.adapters.modules import ModuleKind
from lorikeet.adapters.sites import Site
from lorikeet.server.base.loader import load_base, outline_base
from lorikeet.server.base.model import BaseModel
from torch import nn

from .family_models import FAMILIES, VOCAB, save_family

CPU = torch.device("cpu")

Loaded = tuple[BaseModel, nn.Module, Path]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """(served, as transformers made it, directory) of one family."""
    directory = tmp_path_factory.mktemp(request.param)
    original = save_family(request.param, directory)
    return load_base(str(directory), device=CPU, compute_dtype=torch.float32, progress=False), original, directory


def test_every_parameter_belongs_to_a_slice_or_a_module(loaded: Loaded) -> None:
    base, original, _ = loaded
    known = base.site_table.by_module.keys() | base.module_table.by_path.keys()
    found = {name.rpartition(".")[0] for name, _ in original.named_parameters(remove_duplicate=False)}
    assert found == known


def test_shapes_kinds_and_ties_are_those_of_the_model(loaded: Loaded) -> None:
    base, original, _ = loaded
    table = base.module_table
    for path, module in table.by_path.items():
        shapes = {name: tuple(p.shape) for name, p in original.get_submodule(path).named_parameters()}
        assert dict(module.shapes) == shapes and module.path == path
        assert module.kind is (ModuleKind.EMBEDDING if path == "model.embed_tokens" else ModuleKind.NORM)
    assert (table.embedding, table.head, table.vocab_size) == ("model.embed_tokens", "lm_head", VOCAB)
    assert table.is_tied == (original.lm_head.weight is original.model.embed_tokens.weight)
    embedding = original.model.embed_tokens
    ratio = embedding(torch.tensor([7])).float() / embedding.weight[7].float()
    assert table.embedding_scale == pytest.approx(ratio.median().item(), rel=1e-2)  # bf16


def test_head_is_the_last_site_and_is_wrapped(loaded: Loaded) -> None:
    base, _, directory = loaded
    head = base.site_table.sites[-1]
    assert [site for site in base.site_table.sites if site.is_head] == [head]
    assert (head.name, head.layer, head.in_features, head.out_features) == ("lm_head", -1, 128, VOCAB)
    assert base.site_table.by_module["lm_head"] == (head, 0)
    assert base.site_table.num_layers == 3
    assert base.site_module(head) is base.model.get_submodule("lm_head")
    assert outline_base(str(directory), directory).site_table.sites == base.site_table.sites

    rows: list[int] = []

    class Wrapper(nn.Module):
        def __init__(self, linear: nn.Module, site: Site) -> None:
            super().__init__()
            self.linear, self.site = linear, site

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.site.is_head:
                rows.append(x.shape[1])
            return self.linear(x)

    ids, positions = torch.randint(3, VOCAB, (1, 9)), torch.arange(9)[None]
    base.model.config._attn_implementation = "eager"
    before = base.logits(ids, positions)
    base.wrap_sites(Wrapper)
    wanted = torch.tensor([8, 2])
    assert torch.allclose(base.logits(ids, positions, rows=wanted), before[wanted], atol=1e-5)
    assert rows == [2]
