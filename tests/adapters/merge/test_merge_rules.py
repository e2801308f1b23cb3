"""What a merge adds to when nobody says, and when its result is refused."""

import math
from pathlib import Path

import pytest
from lorikeet.adapters.merge.loss_rule import given_up, refuse_after, refuse_before
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.adapters.merge.training_base import default_onto


def adapter(
    directory: Path, card: str | None = None, trained_for: str | None = "org/model"
) -> tuple[str, str | None, Path]:
    directory.mkdir(parents=True)
    if card is not None:
        (directory / "README.md").write_text(card)
    return directory.name, trained_for, directory


@pytest.mark.parametrize(
    ("card", "trained_for", "onto", "said"),
    [
        (None, "unsloth/llama-3-8b-bnb-4bit", Onto.NF4, "llama-3-8b-bnb-4bit"),
        (None, "/models/Llama-nf4", Onto.NF4, "4-bit copy"),
        ("- load_in_4bit: True\n- bnb_4bit_quant_type: nf4", "org/model", Onto.NF4, "load_in_4bit: true"),
        ('"load_in_4bit": false,', "org/model", Onto.ORIGINAL, "load_in_4bit: false"),
        ("load_in_4bit: false\nload_in_4bit: true", "org/model", Onto.NF4, "load_in_4bit: true"),
        ("Learned with QLoRA.", "org/model", Onto.NF4, "says QLoRA"),
        ("| base while training | `x`, NF4 with double quantization |", None, Onto.NF4, "says NF4"),
        ("| base while training | `x`, 16 bit |\n\nOn the NF4 base: 51", None, Onto.ORIGINAL, "while training: 16 bit"),
        ("base while training: 16 bit", None, Onto.ORIGINAL, "while training: 16 bit"),
        ("A LoRA.", "org/model", Onto.NF4, "do not say"),
        (None, None, Onto.NF4, "do not say"),
        (None, "org/model-nf4tune", Onto.NF4, "do not say"),
    ],
    ids=[
        "bnb-name", "nf4-name", "peft-card", "16-bit-card", "two-settings", "qlora-card", "nf4-card", "16-bit-row",
        "16-bit-words", "plain-card",
        "nothing", "no-suffix",
    ],
)  # fmt: skip
def test_the_default_follows_what_the_adapter_was_trained_on(
    card: str | None, trained_for: str | None, onto: Onto, said: str, tmp_path: Path
) -> None:
    choice = default_onto([adapter(tmp_path / "a", card, trained_for)], has_original=True)
    assert choice.onto is onto and said in choice.reason


def test_several_adapters_go_onto_nf4_unless_all_were_trained_on_16_bit(tmp_path: Path) -> None:
    sixteen = adapter(tmp_path / "sixteen", "load_in_4bit: false")
    other = adapter(tmp_path / "other", "load_in_4bit=False")
    qlora = adapter(tmp_path / "qlora", "QLoRA")
    unknown = adapter(tmp_path / "unknown")
    assert default_onto([sixteen, other], has_original=True).onto is Onto.ORIGINAL
    assert default_onto([sixteen, qlora], has_original=True).onto is Onto.NF4
    mixed = default_onto([sixteen, unknown], has_original=True)
    assert mixed.onto is Onto.NF4 and "unknown" in mixed.reason


def test_an_nf4_checkpoint_has_nothing_else(tmp_path: Path) -> None:
    choice = default_onto([adapter(tmp_path / "a", "load_in_4bit: false")], has_original=False)
    assert choice.onto is Onto.NF4 and "NF4 checkpoint" in choice.reason


@pytest.mark.parametrize(
    ("base", "unmerged", "merged", "lost"),
    [
        (25.0, 15.0, 15.0, 0.0),
        (25.0, 15.0, 20.0, 0.5),
        (25.0, 15.0, 25.0, 1.0),
        (25.0, 15.0, 14.0, -0.1),
    ],
)
def test_what_is_given_up_is_a_part_of_the_gain(base: float, unmerged: float, merged: float, lost: float) -> None:
    assert given_up(base, unmerged, merged) == pytest.approx(lost)


def test_a_result_that_gives_up_more_than_half_is_refused() -> None:
    assert refuse_after(25.0, 15.0, 20.0) is None
    assert refuse_after(4.33, 3.55, 3.60) is None
    reason = refuse_after(4.35, 3.55, 4.33)  # as published for NF4
    assert reason is not None and "gives up 98% of it" in reason and "50%" in reason
    assert refuse_after(25.0, 15.0, math.nan) is not None
    assert refuse_after(25.0, 15.0, math.inf) is not None


def test_a_text_that_shows_no_gain_proves_nothing() -> None:
    for unmerged in (25.0, 26.0, math.nan, math.inf):
        assert "cannot tell" in (refuse_after(25.0, unmerged, 20.0) or "")


def test_nf4_is_refused_before_anything_is_measured() -> None:
    assert "NF4" in (refuse_before(Target.NF4) or "")
    assert [to for to in Target if refuse_before(to) is not None] == [Target.NF4]
