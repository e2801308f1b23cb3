"""An adapter for another base is refused, as far as what both say of it proves that it is another one."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorikeet.adapters.errors import AdapterIncompatibleError
from lorikeet.adapters.fingerprint import BaseFingerprint, is_public_name

HASH, OTHER_HASH = (hashlib.sha256(name).hexdigest() for name in (b"a base", b"another"))
LLAMA = BaseFingerprint("meta-llama/Llama-3-8B")


@pytest.mark.parametrize(
    "trained_for",
    [
        "meta-llama/Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit", "/data/models/Llama-3-8B/", "Llama-3-8B-hf", "", None,
        "/root/.cache/huggingface/hub/models--meta-llama--Llama-3-8B/snapshots/8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
    ],
)  # fmt: skip
def test_same_name_is_accepted_however_it_is_written(trained_for):
    assert LLAMA.check(trained_for, None, allow_other=False) is None


@pytest.mark.parametrize("trained_for", ["mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3-8B-Instruct", "gpt2"])
def test_another_public_name_is_refused_with_both_and_the_remedy(trained_for):
    with pytest.raises(AdapterIncompatibleError) as caught:
        LLAMA.check(trained_for, None, allow_other=False)
    for words in (
        trained_for,
        "meta-llama/Llama-3-8B",
        "allow_other_base",
        "--adapter-allow-other-base",
        "--base-names",
    ):
        assert words in caught.value.message


def test_another_name_is_a_warning_where_it_is_allowed():
    warning = LLAMA.check("mistralai/Mistral-7B-v0.1", None, allow_other=True)
    assert warning is not None and "Mistral-7B" in warning and "Llama-3-8B" in warning


def test_name_of_a_directory_proves_nothing_of_the_base():
    base = BaseFingerprint("/srv/models/base", certain=False)
    warning = base.check("meta-llama/Llama-3-8B", None, allow_other=False)
    assert warning is not None and "Shapes fit" in warning and "Llama-3-8B" in warning
    assert "/srv" not in warning


@pytest.mark.parametrize(
    "trained_for", ["/home/me/runs/base", "./base", "../base", "~/base", "C:\\runs\\base", "a/b/c"]
)
def test_name_of_a_directory_proves_nothing_of_the_adapter(trained_for):
    assert "Shapes fit" in (LLAMA.check(trained_for, None, allow_other=False) or "")


def test_other_names_of_the_base_count():
    base = BaseFingerprint("meta-llama/Llama-3-8B", also=("my-org/house-model",))
    assert base.check("my-org/house-model-4bit", None, allow_other=False) is None
    with pytest.raises(AdapterIncompatibleError):
        base.check("my-org/other", None, allow_other=False)


def test_equal_hash_overrides_another_name():
    base = BaseFingerprint("meta-llama/Llama-3-8B", sha256=HASH)
    assert base.check("my-org/renamed", HASH, allow_other=False) is None


@pytest.mark.parametrize("certain", [True, False])
def test_another_hash_is_refused_under_the_same_name(certain):
    base = BaseFingerprint("meta-llama/Llama-3-8B", certain=certain, sha256=HASH)
    with pytest.raises(AdapterIncompatibleError) as caught:
        base.check("meta-llama/Llama-3-8B", OTHER_HASH, allow_other=False)
    for words in (HASH, OTHER_HASH, "allow_other_base", "4-bit"):
        assert words in caught.value.message
    assert OTHER_HASH in (base.check("meta-llama/Llama-3-8B", OTHER_HASH, allow_other=True) or "")


@pytest.mark.parametrize("card", [None, HASH])
def test_without_two_hashes_names_decide(card):
    base = BaseFingerprint("meta-llama/Llama-3-8B", sha256="" if card else HASH)
    assert base.check("meta-llama/Llama-3-8B", card, allow_other=False) is None
    with pytest.raises(AdapterIncompatibleError):
        base.check("mistralai/Mistral-7B-v0.1", card, allow_other=False)


def test_unknown_base_takes_everything():
    assert BaseFingerprint().check("meta-llama/Llama-3-8B", HASH, allow_other=False) is None


@given(trained_for=st.text(max_size=300), name=st.text(max_size=300), certain=st.booleans())
def test_any_text_is_accepted_reported_or_refused(trained_for, name, certain):
    base = BaseFingerprint(name, certain)
    try:
        warning = base.check(trained_for, None, allow_other=False)
    except AdapterIncompatibleError as error:
        assert certain and name and trained_for and len(error.message) < 3000
    else:
        assert warning is None or len(warning) < 3000
    assert base.check(name, None, allow_other=False) is None


@pytest.mark.parametrize(
    ("name", "public"),
    [("org/name", True), ("org/name-1.5_b", True), ("name", False), ("/a/b", False), ("./a", False), ("a/b/c", False)],
)
def test_public_names_have_an_organisation(name, public):
    assert is_public_name(name) is public
