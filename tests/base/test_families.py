"""Every family's served forward equals transformers' own on the same NF4 weights."""

from pathlib import Path

import pytest
import torch
from lorikeet.server.base.families import PROVEN
from lorikeet.server.base.loader import load_base
from lorikeet.server.base.model import BaseModel
from lorikeet.server.base.selfcheck import check_unproven_family
from lorikeet.server.errors import BaseModelError
from torch import nn

from ..devices import CPU, Place, on_each_device, places
from .family_models import FAMILIES, VOCAB, oracle, save_family
from .paged_driver import PagedDriver

LENGTHS = (41, 1, 17, 30)
# fp32 compute on equal weights: only the order of additions differs.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=places(FAMILIES, "families"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, nn.Module]:
    """(served in fp32, oracle in fp32) of one family."""
    place: Place = request.param
    directory = tmp_path_factory.mktemp(place.family)
    save_family(place.family, directory)
    base = load_base(str(directory), device=place.device, compute_dtype=torch.float32, progress=False)
    return base, oracle(directory, place.device)


def sequences(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def assert_equal_everywhere(
    base: BaseModel, reference: nn.Module, schedule: list[list[tuple[int, int]]], tolerance: float
) -> None:
    """Logits of every token, whatever step it ran in, equal the reference's over the whole sequence."""
    driver = PagedDriver(base, sequences(seed=len(schedule)))
    parts: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(LENGTHS))}
    for counts in schedule:
        for i, logits in driver.step(counts).items():
            parts[i].append(logits)
    for i, tokens in enumerate(driver.sequences):
        inputs = torch.tensor([tokens], device=base.device)
        want = reference(input_ids=inputs, use_cache=False).logits[0].float()
        got = torch.cat(parts[i])
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_prefill_of_several_sequences_at_once(pair: tuple[BaseModel, nn.Module]) -> None:
    assert_equal_everywhere(*pair, [[(i, n) for i, n in enumerate(LENGTHS)]], TOLERANCE)


def test_decode_token_by_token(pair: tuple[BaseModel, nn.Module]) -> None:
    schedule = [[(i, 1) for i, n in enumerate(LENGTHS) if t < n] for t in range(max(LENGTHS))]
    assert_equal_everywhere(*pair, schedule, TOLERANCE)


def test_chunked_prefill_mixed_with_decodes(pair: tuple[BaseModel, nn.Module]) -> None:
    schedule = [[(0, 13)], [(0, 1), (2, 9)], [(3, 7), (0, 1)], [(2, 8), (0, 9), (3, 1), (1, 1)], [(0, 17), (3, 22)]]
    assert_equal_everywhere(*pair, schedule, TOLERANCE)


def test_every_proven_family_has_a_case_here(pair: tuple[BaseModel, nn.Module]) -> None:
    assert pair[0].architecture in PROVEN
    assert len(PROVEN) == len(FAMILIES)


@on_each_device
def test_bf16_compute_stays_close_to_fp32(device: torch.device, tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    base = load_base(str(tmp_path), device=device, compute_dtype=torch.bfloat16, progress=False)
    # bf16 has 8 bits of mantissa; three layers of this width stay within 0.1 of logits with a spread of about 1.
    assert_equal_everywhere(base, oracle(tmp_path, device), [[(i, n) for i, n in enumerate(LENGTHS)]], 0.12)


def test_unproven_family_is_compared_with_its_own_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_family("qwen3", tmp_path)
    base = load_base(str(tmp_path), device=CPU, compute_dtype=torch.float32, progress=False)
    base.architecture = "SomethingNewForCausalLM"
    base.lean = None  # which knows no such family
    check_unproven_family(base)
    monkeypatch.setattr("lorikeet.server.base.attention.ops.paged_attention", lambda q, *_: torch.zeros_like(q))
    with pytest.raises(BaseModelError, match="SomethingNewForCausalLM"):
        check_unproven_family(base)
