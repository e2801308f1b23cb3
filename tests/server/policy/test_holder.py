"""The policy in force, its reload, and the client whom it judges."""

import threading
import tracemalloc

import pytest
import structlog
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.errors import ClientNotAllowedError, ConfigError
from lorikeet.server.interceptors import current_client
from lorikeet.server.policy.holder import PolicyHolder

ALICE_ONLY = '[clients.alice]\nuse = ["*"]\n'


@pytest.fixture
def as_client():
    """Sets the client of the call that is being served."""
    tokens = []

    def become(client: str | None) -> None:
        tokens.append(current_client.set(client))

    yield become
    for token in reversed(tokens):
        current_client.reset(token)


def test_without_a_file_everybody_may_do_everything(as_client):
    holder = PolicyHolder(None)
    as_client("anybody")
    holder.may_use("kjv")
    holder.may_manage("kjv")
    assert holder.may_see("kjv")
    assert holder.limits("kjv") == AdapterLimits()
    assert holder.reload()


def test_client_of_the_call_is_judged(as_client, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(ALICE_ONLY)
    holder = PolicyHolder(path)
    as_client("alice")
    holder.may_use("")
    assert holder.may_see("kjv")
    for client in ("bob", None):
        as_client(client)
        assert not holder.may_see("kjv")
        with pytest.raises(ClientNotAllowedError):
            holder.may_use("kjv")
        with pytest.raises(ClientNotAllowedError):
            holder.may_manage("kjv")


def test_file_that_is_wrong_ends_the_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        PolicyHolder(tmp_path / "missing.toml")


def test_reload_puts_another_policy_into_force_and_says_so(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[default]\nmax_running = 1")
    holder = PolicyHolder(path)
    seen = []
    holder.on_change = lambda: seen.append(holder.limits("a").max_running)
    path.write_text("[default]\nmax_running = 2")
    assert holder.limits("a").max_running == 1
    assert holder.reload()
    assert seen == [2]


@pytest.mark.parametrize("text", [None, "[clients.alice]\nusee = []", "[clien"])
def test_wrong_file_keeps_the_old_policy_and_the_log_says_why(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text("[default]\nmax_running = 1")
    holder = PolicyHolder(path)
    holder.on_change = lambda: pytest.fail("nothing has changed")
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    before = holder.policy
    with structlog.testing.capture_logs() as logs:
        assert not holder.reload()
    assert holder.policy is before and holder.limits("a").max_running == 1
    [entry] = logs
    assert (entry["event"], entry["log_level"]) == ("policy_not_reloaded", "error")
    assert "policy.toml" in entry["reason"]


def test_reloads_at_once_end_with_what_the_file_says(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[default]\nmax_running = 1")
    holder = PolicyHolder(path)
    path.write_text("[default]\nmax_running = 7")
    threads = [threading.Thread(target=holder.reload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert holder.limits("a").max_running == 7


def test_names_that_callers_make_up_leave_nothing_behind(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(ALICE_ONLY + '[clients."team-*"]\nuse = ["kjv"]\n[adapters."a*"]\nmax_running = 2\n')
    policy = PolicyHolder(path).policy

    def ask(start: int) -> None:
        for i in range(start, start + 10_000):
            policy.may_list(f"team-{i}", f"adapter{i}")
            policy.limits(f"adapter{i}")
            with pytest.raises(ClientNotAllowedError):
                policy.may_use(f"client{i}", f"adapter{i}")

    ask(0)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        ask(10_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # 10,000 names would be a megabyte
