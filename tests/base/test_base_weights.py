"""What adapters are told of the base's weights equals bitsandbytes' own values, however they lie in memory."""

import threading

import pytest
import torch
from lorikeet.server.base import weights
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from torch import nn

from .family_models import oracle, save_family

CPU = torch.device("cpu")


# Tied head; biases in q, k and v; fused projections.
@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, nn.Module]:
    """(served, transformers' model with bitsandbytes' NF4 values in fp32)."""
    directory = tmp_path_factory.mktemp(request.param)
    save_family(request.param, directory)
    base = load_base(str(directory), device=CPU, compute_dtype=torch.float32, progress=False)
    return base, oracle(directory)


@pytest.mark.parametrize("piece", [2**22, 1, 1000], ids=lambda n: f"pieces_of_{n}")
def test_column_norms_are_those_of_the_changed_weight(
    piece: int, pair: tuple[BaseModel, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, reference = pair
    monkeypatch.setattr(weights, "_PIECE", piece)
    for module in [*list(base.site_table.by_module)[:7], "lm_head"]:
        weight = reference.get_submodule(module).weight.data
        a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
        got = base.weights.column_norms(module, a, b)
        # fp32: the same values, added in another order
        torch.testing.assert_close(got, torch.linalg.norm(weight + b @ a, dim=1), rtol=1e-5, atol=0)
        got += 1  # an ordinary tensor, not one of inference mode


def test_biases_are_those_of_the_slice(pair: tuple[BaseModel, nn.Module]) -> None:
    base, reference = pair
    for module in base.site_table.by_module:
        expected = reference.get_submodule(module).bias
        got = base.weights.bias(module)
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected.float())
    assert (base.weights.bias("model.layers.1.self_attn.o_proj") is None) and base.weights.bias("lm_head") is None


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_equal_means_equal_in_the_compute_type(
    module: str, pair: tuple[BaseModel, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, reference = pair
    monkeypatch.setattr(weights, "_PIECE", 1000)
    same = reference.get_submodule(module).weight.data.bfloat16()
    assert base.weights.equals(module, "weight", same)
    assert base.weights.equals(module, "weight", same.double())
    assert not base.weights.equals(module, "weight", same[:-1])
    assert not base.weights.equals(module, "bias", same)
    changed = same.clone()
    changed[-1, -1] += 1
    assert not base.weights.equals(module, "weight", changed)


def test_answers_do_not_depend_on_parameters_that_are_swapped_meanwhile(pair: tuple[BaseModel, nn.Module]) -> None:
    base, reference = pair
    embedding = base.model.get_submodule("model.embed_tokens")
    own = embedding._parameters["weight"]
    embedding._parameters["weight"] = nn.Parameter(torch.zeros(1, 1), requires_grad=False)
    try:
        assert base.weights.equals("model.embed_tokens", "weight", reference.get_submodule("model.embed_tokens").weight)
    finally:
        embedding._parameters["weight"] = own


def test_several_threads_may_ask_at_once(pair: tuple[BaseModel, nn.Module]) -> None:
    base, reference = pair
    factors = {}
    for module in base.site_table.by_module:
        out_features, in_features = reference.get_submodule(module).weight.shape
        factors[module] = (torch.randn(2, in_features), torch.randn(out_features, 2))
    expected = {m: base.weights.column_norms(m, *f) for m, f in factors.items()}
    wrong: list[str] = []

    def ask() -> None:
        wrong.extend(m for m, f in factors.items() if not torch.equal(base.weights.column_norms(m, *f), expected[m]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
