"""A real server with a policy file: refusals, caps, and a reload on SIGHUP while it runs."""

import signal
from pathlib import Path

import pytest
from lorikeet.server.client import LorikeetClient
from lorikeet.server.status import RemoteError

from ..process import eventually, running_server

CLOSED = """
[clients.alice]
use = ["am*"]

[default]
tokens_per_minute = 20
"""
PROMPT = "In the beginning God created the heaven and the earth."  # with the output more than 20 tokens
OPEN = '[clients."*"]\nuse = ["*"]\n'


def generate(address: str, client: str, adapter: str) -> str:
    """The text, or the error's reason."""
    with LorikeetClient(address, timeout_s=60, client_name=client) as stub:
        try:
            return stub.generate(prompt=PROMPT, adapter_id=adapter, max_tokens=4, ignore_eos=True).text
        except RemoteError as error:
            return error.reason


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(CLOSED)
    return path


def test_policy_holds_and_is_reloaded(server_arguments, tiny_adapters, policy_file, tmp_path):
    arguments = [*server_arguments, "--adapters", str(tiny_adapters), "--policy", str(policy_file)]
    with running_server(tmp_path / "log", *arguments) as server:
        for adapter in ("amber", "no-such-adapter", ""):
            assert generate(server.address, "bob", adapter) == "CLIENT_NOT_ALLOWED"
            assert generate(server.address, "", adapter) == "CLIENT_NOT_ALLOWED"
        assert generate(server.address, "alice", "amber") not in ("CLIENT_NOT_ALLOWED", "ADAPTER_RATE")
        # That used up what the adapter has for a minute.
        assert generate(server.address, "alice", "amber") == "ADAPTER_RATE"
        assert generate(server.address, "alice", "") == "CLIENT_NOT_ALLOWED"

        policy_file.write_text("[clients.alice]\nuse = 3")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "policy_not_reloaded" in (tmp_path / "log").read_text())
        assert generate(server.address, "bob", "amber") == "CLIENT_NOT_ALLOWED"

        policy_file.write_text(OPEN)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: generate(server.address, "bob", "amber") not in ("CLIENT_NOT_ALLOWED", "ADAPTER_RATE"))
        assert generate(server.address, "", "") not in ("CLIENT_NOT_ALLOWED", "ADAPTER_RATE")
