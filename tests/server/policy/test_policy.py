"""What a policy file lets clients do, and what it gives adapters."""

import textwrap
from pathlib import Path

import pytest
from lorikeet.server.engine.limits import AdapterLimits
from lorikeet.server.errors import ClientNotAllowedError, ConfigError
from lorikeet.server.policy.document import read_document
from lorikeet.server.policy.policy import Policy

EXAMPLE = """
    [clients.alice]
    use = ["support-*", "prod"]
    manage = ["support-de-*"]

    [clients."team-*"]
    use = ["@base", "kjv"]

    [clients."*"]
    manage = ["mine"]

    [adapters."support-*"]
    weight = 2.0
    max_running = 8
    tokens_per_minute = 60_000

    [adapters.support-big]
    max_running = "unlimited"

    [adapters."@base"]
    weight = 3

    [default]
    weight = 0.5
    max_waiting = 64
"""


@pytest.fixture
def policy_of(tmp_path: Path):
    def read(text: str) -> Policy:
        path = tmp_path / "policy.toml"
        path.write_text(textwrap.dedent(text))
        return Policy(read_document(path))

    return read


def allowed(policy: Policy, client: str | None, name: str) -> tuple[bool, bool, bool]:
    """May use, manage, list."""
    results = []
    for ask in (policy.may_use, policy.may_manage):
        try:
            ask(client, name)
            results.append(True)
        except ClientNotAllowedError:
            results.append(False)
    return results[0], results[1], policy.may_list(client, name)


@pytest.mark.parametrize(
    ("client", "name", "expected"),
    [
        ("alice", "support-fr", (True, False, True)),
        ("alice", "support-de-1", (True, True, True)),
        ("alice", "support-de-1@abcd", (True, True, True)),
        ("alice", "prod", (True, False, True)),
        ("alice", "prod2", (False, False, False)),
        ("alice", "mine", (False, False, False)),  # only one entry holds: not that of `*` too
        ("alice", "", (False, False, False)),
        ("Alice", "prod", (False, False, False)),
        ("team-1", "", (True, False, True)),
        ("team-1", "base", (False, False, False)),
        ("team-1", "kjv", (True, False, True)),
        ("bob", "mine", (False, True, True)),
        ("*", "mine", (False, True, True)),
        (None, "mine", (False, True, True)),
        (None, "", (False, False, False)),
    ],
)
def test_who_may_do_what(policy_of, client, name, expected):
    assert allowed(policy_of(EXAMPLE), client, name) == expected


@pytest.mark.parametrize("text", ["", "[default]\nweight = 2.0"])
@pytest.mark.parametrize("client", ["alice", None])
def test_without_clients_in_the_file_everybody_may_do_everything(policy_of, text, client):
    assert allowed(policy_of(text), client, "kjv") == allowed(policy_of(text), client, "") == (True, True, True)


@pytest.mark.parametrize("text", ["[clients]", '[clients.alice]\nuse = ["*"]'])
@pytest.mark.parametrize("client", ["bob", None])
def test_with_clients_whoever_none_matches_may_do_nothing(policy_of, text, client):
    assert allowed(policy_of(text), client, "kjv") == allowed(policy_of(text), client, "") == (False, False, False)


def test_star_is_everything_the_base_too(policy_of):
    policy = policy_of('[clients."*"]\nuse = ["*"]')
    assert allowed(policy, None, "") == allowed(policy, "bob", "kjv") == (True, False, True)


@pytest.mark.parametrize(
    ("adapter_id", "expected"),
    [
        ("support-fr", AdapterLimits(2.0, 8, 64, 60_000)),
        ("support-big", AdapterLimits(0.5, None, 64, None)),  # of the more exact entry, else the default
        ("kjv", AdapterLimits(0.5, None, 64, None)),
        ("", AdapterLimits(3.0, None, 64, None)),
        ("base", AdapterLimits(0.5, None, 64, None)),
    ],
)
def test_limits(policy_of, adapter_id, expected):
    assert policy_of(EXAMPLE).limits(adapter_id) == expected


def test_limits_of_the_base_are_its_own_or_those_of_star(policy_of):
    policy = policy_of('[adapters."*base"]\nmax_running = 1\n[adapters."*"]\nmax_running = 2')
    assert policy.limits("").max_running == 2
    assert policy.limits("my-base").max_running == 1
    assert Policy().limits("") == Policy().limits("kjv") == AdapterLimits()


def test_unlimited_lifts_a_default_cap(policy_of):
    text = '[default]\nmax_running = 2\ntokens_per_minute = 10\n[adapters.a]\nmax_running = "unlimited"'
    assert policy_of(text).limits("a") == AdapterLimits(1.0, None, None, 10)


def test_refusal_does_not_show_what_exists_and_keeps_long_names_out(policy_of):
    policy = policy_of(EXAMPLE)
    with pytest.raises(ClientNotAllowedError) as caught:
        policy.may_use("alice", "secret" + "x" * 100_000)
    error = caught.value
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "CLIENT_NOT_ALLOWED")
    assert "alice" in error.message and "use" in error.message and len(error.message) < 400
    assert set(error.metadata) == {"client", "adapter_id"}
    with pytest.raises(ClientNotAllowedError, match=r"does not name itself.*the base model"):
        policy.may_use(None, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[clients.alice]\nusee = []", ["clients.alice.usee is not a key", "use, manage"]),
        ('[adapters."a*"]\nmax_run = 1', ['adapters."a*".max_run is not a key', "max_running"]),
        ("[default]\nuse = []", ["default.use is not a key"]),
        ("[defaults]", ["defaults is not a key", "clients, adapters, default"]),
        ('[clients.alice]\nuse = "prod"', ["clients.alice.use cannot be 'prod'", "a list of"]),
        ('[clients.alice]\nuse = ["a/b"]', ["clients.alice.use cannot be 'a/b'", "@base"]),
        ('[clients.alice]\nuse = ["a@b"]', ["clients.alice.use cannot be 'a@b'"]),
        ('[adapters."@bases"]', ['adapters."@bases" cannot be called so', "letters, digits"]),
        ('[clients."ü"]', ['clients."ü" cannot be called so', "ASCII"]),
        ("[clients]\nalice = 1", ["clients.alice cannot be 1; allowed: a table"]),
        ("[adapters.a]\nweight = 0", ["adapters.a.weight cannot be 0", "0.001 to 1000"]),
        ("[adapters.a]\nweight = nan", ["adapters.a.weight cannot be nan"]),
        ("[adapters.a]\nweight = true", ["adapters.a.weight cannot be True"]),
        ("[adapters.a]\nmax_running = 0", ["adapters.a.max_running cannot be 0", '1 or more, or "unlimited"']),
        ("[adapters.a]\nmax_running = 1.5", ["adapters.a.max_running cannot be 1.5"]),
        ('[default]\nmax_waiting = "8"', ["default.max_waiting cannot be '8'"]),
        ("[default]\nweight = 'x'\nmax_waiting = -1", ["default.weight", "default.max_waiting"]),
        ("[clients", ["is not TOML"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_name(policy_of, text, words):
    with pytest.raises(ConfigError) as caught:
        policy_of(text)
    for word in (*words, "policy.toml"):
        assert word in caught.value.message


def test_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_document(path)
    (tmp_path / "latin.toml").write_bytes(b'[clients."\xe9"]')
    with pytest.raises(ConfigError, match="is not TOML"):
        read_document(tmp_path / "latin.toml")


def test_example_of_the_documentation_is_a_policy(policy_of):
    from lorikeet.server.policy import document

    lines = document.__doc__.splitlines()
    example = "\n".join(line for line in lines if line.startswith("    "))
    policy = policy_of(example)
    assert allowed(policy, "alice", "support-fr") == (True, True, True)
    assert allowed(policy, None, "") == (True, False, True)
    assert policy.limits("support-fr") == AdapterLimits(2.0, 8, 64, 60_000)
    assert policy.limits("other") == AdapterLimits(1.0, None, 256, None)
