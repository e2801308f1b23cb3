"""Every kind of adapter in one step, alone, composed and in chunks, equals an ordinary torch model with its changes."""

import random

import pytest
import torch
from lorikeet.adapters.layers import LoraLinear
from torch import Tensor, nn

from ..base.family_models import VOCAB
from ..devices import Place, on_each_device, places
from .adapted_runner import ADDED, LESS, MORE, AdaptedRunner, Stream

# (dtype fp32, tolerance): equal weights on both sides; matmuls are grouped differently.
TOLERANCE = 2e-4

KINDS = ("lora", "head", "affine", "embedding", "larger", "smaller", "tokens", "added", "norms", "linears", "own_head")
COMPOSITIONS = (
    (("lora", 0.6),),
    (("embedding", -0.5),),
    (("lora", 0.5), ("head", -0.7), ("embedding", 1.3)),
    (("lora", 0.4), ("larger", 1.0)),
    (("norms", 1.0), ("head", 0.0), ("lora", 1.0)),
    (("added", 1.0), ("norms", 1.0)),
)


# Tied head; biases; scaled embeddings, norms of 1 + w and transposed norms of heads; soft-capped logits; norms of
# heads; fused projections.
@pytest.fixture(scope="module", params=places(["llama", "qwen2", "gemma3", "gemma2", "qwen3", "phi3"], "runner"))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedRunner:
    place: Place = request.param
    return AdaptedRunner(place.family, tmp_path_factory.mktemp(place.family), device=place.device)


def check(world: AdaptedRunner, sequence: Stream, logits: Tensor, tolerance: float = TOLERANCE) -> None:
    want = world.expected(sequence)
    assert logits.dtype == torch.float32 and len(logits) >= len(want)
    name = "+".join(name for name, _ in sequence.members)
    torch.testing.assert_close(
        logits[: len(want)], want, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name} at {sequence.done}: {m}"
    )
    assert (logits[len(want) :] == -torch.inf).all()


def all_sequences(world: AdaptedRunner) -> list[Stream]:
    mixes = [(), *(((kind, 1.0),) for kind in KINDS), *COMPOSITIONS, ()]
    return [world.sequence(i, random.randint(2, 20), *members) for i, members in enumerate(mixes)]


def test_everything_in_one_prefill(world: AdaptedRunner) -> None:
    sequences = all_sequences(world)
    rows = world.step([(sequence, len(sequence.tokens), True) for sequence in sequences])
    for sequence, logits in zip(sequences, rows, strict=True):
        assert len(logits) == MORE
        check(world, sequence, logits)


def test_everything_in_chunks_mixed_with_decodes(world: AdaptedRunner) -> None:
    sequences = all_sequences(world)
    while left := [sequence for sequence in sequences if sequence.done < len(sequence.tokens)]:
        some = random.sample(left, random.randint(1, len(left)))
        # Some in the middle of their prompts do not sample, and some steps have none that does.
        items = [
            (s, random.choice([1, 1, random.randint(1, len(s.tokens) - s.done)]), random.random() < 0.6) for s in some
        ]
        rows = iter(world.step(items))
        for sequence, _, samples in items:
            if samples:
                check(world, sequence, next(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_with_one_row_and_with_more(kind: str, world: AdaptedRunner) -> None:
    sequence = world.sequence(0, 9, (kind, 1.0))
    for n in (1, 7, 1):
        (logits,) = world.step([(sequence, n, True)])
        check(world, sequence, logits)
        assert len(logits) == max(VOCAB, {"larger": MORE, "added": ADDED}.get(kind, 0))


@pytest.mark.parametrize("rows", [1, 2])
def test_norms_of_heads_where_rows_are_as_many_as_heads(rows: int, world: AdaptedRunner) -> None:
    """4 heads of queries and 2 of keys; half of the rows have norms of their own."""
    first, second = world.sequence(0, 2 * rows), world.sequence(1, 2 * rows, ("norms", 1.0))
    for _ in range(2):
        both = world.step([(first, rows, True), (second, rows, True)])
        for sequence, logits in zip((first, second), both, strict=True):
            check(world, sequence, logits)


def test_each_kind_changes_the_answer(world: AdaptedRunner) -> None:
    for kind in KINDS:
        sequence = world.sequence(0, 9, (kind, 1.0))
        sequence.tokens = [min(token, LESS - 1) for token in sequence.tokens]
        (logits,) = world.step([(sequence, 9, True)])
        plain = Stream(sequence.tokens, -1, (), sequence.block_table, 9)
        size = LESS if kind == "smaller" else VOCAB
        assert (logits[:size] - world.expected(plain)[:size]).abs().max() > 1e-2, kind


def test_base_rows_are_the_base_bit_for_bit_beside_any_adapter(world: AdaptedRunner) -> None:
    for kind in KINDS:
        base, other = world.sequence(0, 6), world.sequence(1, 5, (kind, 1.0))
        both = world.step([(base, 6, True), (other, 5, True)])
        plain = [world.sequence(0, 6), world.sequence(1, 5)]
        plain[0].tokens = base.tokens
        alone = world.step([(plain[0], 6, True), (plain[1], 5, True)])
        assert torch.equal(both[0][:VOCAB], alone[0]), kind
        assert (both[0][VOCAB:] == -torch.inf).all()


def test_step_without_overrides_hooks_nothing_and_no_hook_outlives_its_step(
    world: AdaptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in world.base.model.modules())

    always = hooks()  # the base's own
    seen: list[int] = []
    forward = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x: (seen.append(hooks()), forward(self, x))[1])
    world.step([(world.sequence(0, 3, ("lora", 0.5)), 3, True), (world.sequence(1, 3, ("affine", 1.0)), 3, True)])
    assert set(seen) == {always}
    seen.clear()
    world.step([(world.sequence(0, 3, ("larger", 1.0)), 3, True)])
    # The lean decoder asks for the rows itself.
    assert set(seen) == {always + (2 if world.base.lean is None else 0)} and hooks() == always

    def broken(self: LoraLinear, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LoraLinear, "forward", broken)
    with pytest.raises(torch.OutOfMemoryError):
        world.step([(world.sequence(0, 3, ("norms", 1.0)), 3, True)])
    assert hooks() == always


@on_each_device
def test_compaction_between_steps_changes_no_answer(
    device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = AdaptedRunner("gemma3", tmp_path_factory.mktemp("compaction"), device=device)
    sequences = all_sequences(world)
    world.step([(sequence, 1, True) for sequence in sequences])
    world.store.remove(world.spare)
    assert world.store.compact() == len(KINDS)
    rows = world.step([(sequence, 1, True) for sequence in sequences])
    for sequence, logits in zip(sequences, rows, strict=True):
        check(world, sequence, logits)


@on_each_device
def test_bf16_stays_close_to_fp32(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> None:
    world = AdaptedRunner("llama", tmp_path_factory.mktemp("bf16"), torch.bfloat16, device)
    sequences = all_sequences(world)
    rows = world.step([(sequence, len(sequence.tokens), True) for sequence in sequences])
    for sequence, logits in zip(sequences, rows, strict=True):
        # bf16 has 8 bits of mantissa; three layers of this width: logits with a spread of about 1 and changed weights.
        check(world, sequence, logits, 0.25)


def test_parameters_are_the_base_s_own_after_a_step(world: AdaptedRunner) -> None:
    before = {name: p for name, p in world.base.model.named_parameters()}
    world.step([(world.sequence(i, 3, (kind, 1.0)), 3, True) for i, kind in enumerate(KINDS)])
    after = dict(world.base.model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(isinstance(p, nn.Parameter) for p in after.values())
