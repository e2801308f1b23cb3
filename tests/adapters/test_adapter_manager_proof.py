"""Replaying a golden file at load: on the version itself, before requests can name it, and its result is heeded."""

import pytest
import torch
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterProofError, AdapterUnloadedError, ServingError
from lorikeet.adapters.golden import GOLDEN_FILE, Golden, serialize_golden
from lorikeet.adapters.info import AdapterState, Tier

from .managing import PLAIN_BYTES, Gate, activate, checked, digest_of, serve, start


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def change(lora_dir, edit_config):
    """change(alpha): make the folder another version that carries a golden file; returns its digest."""

    def change(alpha):
        edit_config(lora_dir, lora_alpha=alpha)
        golden = Golden(digest_of(lora_dir), ((1, 2, 3), (4,)), torch.randn(2, 64), 0.1, "this test")
        (lora_dir / GOLDEN_FILE).write_bytes(serialize_golden(golden))
        return golden.digest

    return change


@pytest.fixture
def manager(make_manager, change):
    change(1)
    return make_manager()


def replay(manager, version):
    """What the server's prover does: a request on the version, which nobody else can name."""
    manager.hold(version)
    activate(manager, version)
    manager.deactivate(version), manager.release(version)


def test_version_is_proven_before_requests_get_it(manager):
    seen = []

    def prove(version, golden, vocab_size):
        assert golden.digest == version.digest and golden.prompts == ((1, 2, 3), (4,))
        for reference in ("plain", f"plain@{version.digest}"):
            with pytest.raises(AdapterNotFoundError):
                manager.resolve(reference)
        seen.append([info.state for info in manager.list() if info.digest == version.digest])
        replay(manager, version)
        return "4 prompts, largest difference 0.001"

    manager.prover = prove
    info = manager.load("plain")
    assert (info.proof, info.state) == ("4 prompts, largest difference 0.001", AdapterState.READY)
    assert seen == [[AdapterState.LOADING]] and serve(manager, "plain").digest == info.digest


def test_golden_file_that_comes_later_is_replayed_although_the_content_is_known(manager, change):
    digest = manager.load("plain").digest
    proofs = iter(["fine", "fine again"])
    manager.prover = lambda version, golden, vocab_size: next(proofs)
    assert [manager.load("plain").proof for _ in range(2)] == ["fine", "fine again"]

    def refuse(version, golden, vocab_size):
        assert manager.get("plain").digest == version.digest, "served meanwhile"
        raise AdapterProofError("The logits are off.")

    manager.prover = refuse
    with pytest.raises(AdapterProofError):
        manager.load("plain")
    info = manager.get("plain")
    assert (info.digest, info.state, info.error) == (digest, AdapterState.READY, "The logits are off.")


def test_version_whose_proof_fails_is_refused_and_the_old_one_served(manager, change):
    old = manager.load("plain").digest

    def refuse(version, golden, vocab_size):
        replay(manager, version)
        raise AdapterProofError("The logits are off.")

    manager.prover = refuse
    change(5)
    with pytest.raises(AdapterProofError):
        manager.load("plain")
    info = manager.get("plain")
    assert (info.digest, info.state, info.error) == (old, AdapterState.READY, "The logits are off.")
    assert manager.snapshot().bytes_used == {Tier.HOST: PLAIN_BYTES, Tier.DEVICE: 0}
    assert serve(manager, "plain").digest == old


def test_prover_that_fails_itself_reaches_no_client(manager):
    def explode(version, golden, vocab_size):
        raise RuntimeError("secret")

    manager.prover = explode
    with pytest.raises(ServingError) as error:
        manager.load("plain")
    assert "secret" not in error.value.message and manager.get("plain").state is AdapterState.FAILED
    assert manager.snapshot().bytes_used[Tier.HOST] == 0


def test_unload_during_the_proof_wins(manager):
    with Gate() as gate:

        def prove(version, golden, vocab_size):
            gate.pass_through()
            replay(manager, version)
            return "fine"

        manager.prover = prove
        loading = start(manager.load, "plain")
        gate.wait_reached()
        manager.unload("plain")
    with pytest.raises(AdapterUnloadedError):
        loading.result(20)
    assert manager.list() == [] and manager.store.used_bytes == 0


def test_rolled_back_version_is_proven_again(manager, change):
    """Its files are what was proven; the base, or this server, may not be."""
    proven = []
    manager.prover = lambda version, golden, vocab_size: proven.append(version.digest) or "fine"
    first = manager.load("plain").digest
    change(5)
    second = manager.load("plain").digest
    assert manager.rollback("plain").proof == "fine" and proven == [first, second, first]
