"""Replaying a golden file at load: on the version itself, before requests can name it, and its result is heeded."""

import pytest
from lorikeet.adapters import reader
from lorikeet.adapters.errors import AdapterNotFoundError, AdapterProofError, AdapterUnloadedError, ServingError
from lorikeet.adapters.golden import GOLDEN_FILE
from lorikeet.adapters.info import AdapterState, Tier

from .managing import PLAIN_BYTES, Gate, activate, checked, serve, start

GOLDEN = object()


@pytest.fixture
def make_manager(make_manager):
    yield from checked(make_manager)


@pytest.fixture
def manager(make_manager, lora_dir, monkeypatch):
    """The adapter carries a golden file."""
    (lora_dir / GOLDEN_FILE).write_bytes(b"what read_golden would parse")
    monkeypatch.setattr(reader, "read_golden", lambda *args, **kwargs: GOLDEN)
    return make_manager()


def replay(manager, version):
    """What the server's prover does: a request on the version, which nobody else can name."""
    manager.hold(version)
    activate(manager, version)
    manager.deactivate(version), manager.release(version)


def test_version_is_proven_before_requests_get_it(manager):
    seen = []

    def prove(version, golden):
        assert golden is GOLDEN
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
    manager.load("plain")
    assert len(seen) == 1, "the same content is proven once"


def test_version_whose_proof_fails_is_refused_and_the_old_one_served(manager, lora_dir, edit_config):
    old = manager.load("plain").digest

    def refuse(version, golden):
        replay(manager, version)
        raise AdapterProofError("The logits are off.")

    manager.prover = refuse
    edit_config(lora_dir, lora_alpha=5)
    with pytest.raises(AdapterProofError):
        manager.load("plain")
    info = manager.get("plain")
    assert (info.digest, info.state, info.error) == (old, AdapterState.READY, "The logits are off.")
    assert manager.snapshot().bytes_used == {Tier.HOST: PLAIN_BYTES, Tier.DEVICE: 0}
    assert serve(manager, "plain").digest == old


def test_prover_that_fails_itself_reaches_no_client(manager):
    def explode(version, golden):
        raise RuntimeError("secret")

    manager.prover = explode
    with pytest.raises(ServingError) as error:
        manager.load("plain")
    assert "secret" not in error.value.message and manager.get("plain").state is AdapterState.FAILED
    assert manager.snapshot().bytes_used[Tier.HOST] == 0


def test_unload_during_the_proof_wins(manager):
    with Gate() as gate:

        def prove(version, golden):
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


def test_rolled_back_version_is_proven_again(manager, lora_dir, edit_config):
    """Its files are what was proven; the base, or this server, may not be."""
    proven = []
    manager.prover = lambda version, golden: proven.append(version.digest) or "fine"
    first = manager.load("plain").digest
    edit_config(lora_dir, lora_alpha=5)
    second = manager.load("plain").digest
    assert manager.rollback("plain").proof == "fine" and proven == [first, second, first]
