"""`lorikeet adapters merge ...` against a server whose merges are played: what is asked, what is printed."""

import json

import pytest
from lorikeet.adapters.merge.errors import MergeDiskError
from lorikeet.adapters.merge.targets import Onto, Target
from lorikeet.protos.v1 import merges_pb2
from lorikeet.server import cli, cli_merges
from lorikeet.server.client import LorikeetClient
from lorikeet.server.client_merges import MergeOptions

from .fake_merges import FakeMerges
from .fakes import serve_on_thread


@pytest.fixture
def merges(tmp_path):
    (tmp_path / "merged").mkdir()
    merges = FakeMerges({"merge_dir": tmp_path / "merged"}, scratch=tmp_path / "scratch")
    merges.go.set()
    return merges


@pytest.fixture
def lorikeet(merges, capsys):
    """Runs `lorikeet adapters merge ...`; its exit status and what it printed."""
    with serve_on_thread(merges=merges) as address:

        def run(*arguments):
            status = cli.run(["adapters", "merge", *arguments, "--address", address])
            return status, *capsys.readouterr()

        run.address = address
        yield run


def test_options_are_the_fields_of_a_request():
    fields = set(merges_pb2.MergeAdapterRequest.DESCRIPTOR.fields_by_name)
    assert MergeOptions.__annotations__.keys() == fields - {"adapters", "output"}


def test_every_flag_reaches_the_server(lorikeet, merges, tmp_path):
    text, calibration = tmp_path / "text", tmp_path / "calibration"
    text.write_text("one\n\ntwo\n")
    calibration.write_text("words")
    status, out, err = lorikeet(
        "start", "kjv:0.5", "kjv@0000", "--output", "new", "--onto", "original", "--to", "gptq", "--text", str(text),
        "--by-paragraph", "--calibration", str(calibration), "--iterations", "9", "--accept-loss", "--allow-other-base",
    )  # fmt: skip
    assert status == 0
    [command] = merges.commands
    assert (command.onto, command.to, command.weights, command.texts) == (
        Onto.ORIGINAL, Target.GPTQ, (0.5, 1.0), ("one", "two"),
    )  # fmt: skip
    assert command.accept_loss and command.allow_other_base and command.iterations == 9 and command.has_calibration
    assert "a table" in out and "wrote new (0.0 MiB of weights) in 1.5 s" in out
    assert "kjv@dddddddddddd:0.5, kjv@000000000000" in err and "merged onto nf4: it was asked for" in err
    assert "warning: mind" in err


def test_it_is_listed_looked_at_and_forgotten(lorikeet, merges):
    assert lorikeet("list")[1] == "no merges\n"
    _, name, _ = lorikeet("start", "kjv", "--output", "a", "--unverified", "--detach")
    with LorikeetClient(lorikeet.address) as client:
        client.merges.wait(name.strip())
    status, out, _ = lorikeet("list")
    assert status == 0 and all(word in out for word in (name.strip(), "succeeded", "kjv@dddddddddddd", "25%"))
    assert "wrote a" in lorikeet("get", name.strip())[1]
    response = json.loads(lorikeet("get", name.strip(), "--json")[1])
    assert response["response"]["onto"] == "nf4" and response["done"]
    assert lorikeet("cancel", name.strip())[0] == 0
    assert lorikeet("delete", name.strip())[0] == 0
    status, _, err = lorikeet("get", name.strip())
    assert status == 1 and "OPERATION_NOT_FOUND" in err


def test_a_merge_that_fails_says_why(lorikeet, merges):
    merges.fail = MergeDiskError("The disk is full: free space.")
    status, out, err = lorikeet("start", "kjv", "--output", "a", "--unverified")
    assert status == 1 and not out and "RESOURCE_EXHAUSTED (MERGE_DISK): The disk is full" in err


def test_an_interruption_cancels_it(lorikeet, merges, monkeypatch, tmp_path):
    merges.go.clear()

    def interrupt(self, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_merges._Bar, "show", interrupt)
    status, _, err = lorikeet("start", "kjv", "--output", "a", "--unverified")
    assert status == 130 and "nothing is left" in err
    assert "cancelled" in lorikeet("list")[1]
    assert list((tmp_path / "merged").iterdir()) == []


def test_text_that_cannot_be_read_is_named_before_anything_is_asked(lorikeet, merges):
    for flags in (["--text", "/nowhere"], ["--unverified", "--calibration", "/nowhere"]):
        status, _, err = lorikeet("start", "kjv", "--output", "a", *flags)
        assert status == 2 and "/nowhere" in err
    assert not merges.commands
