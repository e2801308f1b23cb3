"""Adapter folders that come, change and go while a real server answers requests."""

import shutil
import threading

import pytest
from lorikeet.protos.v1 import adapters_pb2
from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError

from ..tiny import TEXT, save_tiny_adapter
from .process import eventually

QUESTION = {"prompt": TEXT[0], "temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def client(server):
    with LorikeetClient(server.address, timeout_s=60) as client:
        yield client


@pytest.fixture
def traffic(server):
    """Requests for `amber` all the time; every one must succeed."""
    stop = threading.Event()
    failures, answers = [], []

    def ask():
        with LorikeetClient(server.address, timeout_s=60) as client:
            while not stop.is_set():
                try:
                    answers.append(tuple(client.generate(**QUESTION, adapter_id="amber", max_tokens=8).token_ids))
                except RemoteError as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(answers)) == 1


def not_found(client, adapter_id):
    try:
        client.generate(**QUESTION, adapter_id=adapter_id, max_tokens=1)
    except RemoteError as error:
        return (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    return False


def test_folder_comes_changes_and_goes_under_traffic(
    client, watched_folder, tiny_adapters, tiny_model, tmp_path, traffic
):
    assert not_found(client, "guest")

    shutil.copytree(tiny_adapters / "birch", watched_folder / "guest")
    old = eventually(lambda: client.generate(**QUESTION, adapter_id="guest", max_tokens=64))
    base = client.generate(**QUESTION, max_tokens=64)
    assert list(old.token_ids) != list(base.token_ids)

    # One request is under way while the folder is replaced: it finishes on the version it began with.
    stream = client.stream(**QUESTION, adapter_id="guest", max_tokens=3000)
    assert next(stream).started.adapter.version == old.adapter.version
    save_tiny_adapter(tiny_model, tmp_path / "new", seed=99, rank=4)
    shutil.copytree(tmp_path / "new", watched_folder / "guest", dirs_exist_ok=True)

    def answered_by_another_version():
        answer = client.generate(**QUESTION, adapter_id="guest", max_tokens=64)
        return answer if answer.adapter.version != old.adapter.version else None

    new = eventually(answered_by_another_version)
    assert list(new.token_ids) != list(old.token_ids)
    tokens = [token for event in stream for token in event.delta.token_ids]
    assert tokens[:64] == list(old.token_ids)
    assert len(tokens) == 3000

    shutil.rmtree(watched_folder / "guest")
    eventually(lambda: not_found(client, "guest"))


def test_half_copied_folder_is_not_served_until_it_is_whole(client, watched_folder, tiny_adapters):
    source, target = tiny_adapters / "cedar", watched_folder / "slow"
    target.mkdir()
    weights = (source / "adapter_model.safetensors").read_bytes()
    shutil.copy(source / "adapter_config.json", target)
    (target / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert not_found(client, "slow")
    with (target / "adapter_model.safetensors").open("ab") as file:
        file.write(weights[len(weights) // 2 :])
    answer = eventually(lambda: client.generate(**QUESTION, adapter_id="slow", max_tokens=4))
    assert answer.adapter.adapter_id == "slow"


def test_load_and_unload_on_demand(server, client, watched_folder, tiny_adapters):
    # A folder whose name begins with a dot is not watched, and can be loaded by its path.
    shutil.copytree(tiny_adapters / "dune", watched_folder / ".staged")
    loads = server.metric("lorikeet_adapter_loads_total", outcome="ok")
    adapter = client.load_adapter("demand", ".staged")
    assert (adapter.state, adapter.max_rank) == (adapters_pb2.ADAPTER_STATE_READY, 16)
    assert {(s.module, s.rank) for s in adapter.slices} == {(f"{x}_proj", 16) for x in "qkvo"}
    assert client.load_adapter("demand", ".staged").version == adapter.version
    assert client.generate(**QUESTION, adapter_id="demand", max_tokens=2).adapter.version == adapter.version
    assert "demand" in {item.adapter_id for item in client.list_adapters()}
    assert server.metric("lorikeet_adapter_loads_total", outcome="ok") > loads
    client.unload_adapter("demand")
    assert not_found(client, "demand")


@pytest.mark.parametrize(
    ("adapter_id", "path", "code", "reason"),
    [
        ("../amber", "", "INVALID_ARGUMENT", "ADAPTER_ID_INVALID"),
        ("x", "../..", "INVALID_ARGUMENT", "ADAPTER_ID_INVALID"),
        ("x", "/etc", "INVALID_ARGUMENT", "ADAPTER_ID_INVALID"),
        ("nothing-there", "", "NOT_FOUND", "ADAPTER_NOT_FOUND"),
    ],
)
def test_load_of_what_may_not_be_loaded(client, adapter_id, path, code, reason):
    with pytest.raises(RemoteError) as caught:
        client.load_adapter(adapter_id, path)
    assert (caught.value.code, caught.value.reason) == (code, reason)


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("pickled", lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "ADAPTER_INVALID"),
        ("empty", lambda d: [path.unlink() for path in d.iterdir()], "ADAPTER_INVALID"),
        (
            "cut",
            lambda d: (d / "adapter_model.safetensors").write_bytes(
                (d / "adapter_model.safetensors").read_bytes()[:-100]
            ),
            "ADAPTER_INVALID",
        ),
        (
            "dora",
            lambda d: (d / "adapter_config.json").write_text(
                (d / "adapter_config.json").read_text().replace('"use_qalora": false', '"use_qalora": true')
            ),
            "ADAPTER_INCOMPATIBLE",
        ),
    ],
    ids=["pickled", "empty", "cut", "dora"],
)
def test_bad_folder_is_refused_with_its_reason_and_the_rest_is_served(
    server, client, watched_folder, tiny_adapters, name, spoil, reason
):
    shutil.copytree(tiny_adapters / "birch", watched_folder / f".{name}")
    spoil(watched_folder / f".{name}")
    failed = server.metric("lorikeet_adapter_loads_total", outcome=reason.lower())
    with pytest.raises(RemoteError) as caught:
        client.load_adapter(name, f".{name}")
    assert caught.value.reason == reason
    assert server.metric("lorikeet_adapter_loads_total", outcome=reason.lower()) == failed + 1
    assert client.generate(**QUESTION, adapter_id="amber", max_tokens=1).usage.generated_tokens == 1
