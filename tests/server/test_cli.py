"""The command line without a server: help, start-up cost, and errors as one line."""

import json
import subprocess
import sys

import pytest
from lorikeet.server import cli, cli_serve
from lorikeet.server.errors import BaseModelError

LORIKEET = [sys.executable, "-c", "from lorikeet.server.cli import main; main()"]


def run(*arguments):
    return subprocess.run([*LORIKEET, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["generate", "--help"], ["adapters", "--help"], ["adapters", "list", "--help"],
        ["adapters", "inspect", "--help"], ["serve", "--help"], ["health", "--help"], ["prepare-demo", "--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(arguments)
    assert caught.value.code == 0
    assert "lorikeet" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    text = capsys.readouterr().out
    for command in ("serve", "generate", "adapters", "health", "prepare-demo"):
        assert command in text


@pytest.mark.parametrize(
    "arguments", [["generate", "--help"], ["serve", "--help"], ["health", "--address", "127.0.0.1:1"]]
)
def test_no_client_command_and_no_help_imports_torch(arguments):
    program = (
        "import sys\n"
        "from lorikeet.server.cli import run\n"
        "try:\n    run(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('IMPORTED', sorted({'torch', 'transformers', 'pydantic'} & sys.modules.keys()))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    expected = ["pydantic"] if arguments[0] == "serve" else []
    assert result.stdout.splitlines()[-1] == f"IMPORTED {expected}"


def test_no_server_is_one_line_with_the_address():
    result = run("generate", "--address", "127.0.0.1:1", "x")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "lorikeet: no server answers at 127.0.0.1:1. Is `lorikeet serve` running there? (--address names another.)"
    )


def test_wrong_setting_is_one_line_and_status_2():
    result = run("serve", "--port", "70000")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("lorikeet: --port cannot be '70000'.")


def test_error_that_the_operator_can_mend_is_one_line(monkeypatch, capsys):
    def refuse(arguments):
        raise BaseModelError("The model directory x has no config.json.")

    monkeypatch.setattr(cli_serve, "serve", refuse)
    assert cli.run(["serve"]) == 2
    assert capsys.readouterr().err == "lorikeet: The model directory x has no config.json.\n"


def test_unexpected_error_has_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli_serve, "serve", lambda arguments: 1 / 0)
    assert cli.run(["serve"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_interrupt_is_status_130(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_serve, "serve", interrupt)
    assert cli.run(["serve"]) == 130


def test_pasteable_command_names_what_is_needed(monkeypatch, tmp_path):
    program = tmp_path / "bin" / "lorikeet"
    program.parent.mkdir()
    program.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(program), "serve"])
    monkeypatch.setenv("PATH", "/nowhere")
    command = cli_serve.client_command("127.0.0.1:50051", ["devil", "kjv"])
    assert command == 'bin/lorikeet generate --adapter kjv --max-tokens 64 "In the beginning"'
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    command = cli_serve.client_command("127.0.0.1:1234", ["devil"])
    assert command == 'lorikeet generate --address 127.0.0.1:1234 --adapter devil --max-tokens 64 "In the beginning"'
    assert "--adapter" not in cli_serve.client_command("127.0.0.1:50051", [])


def test_inspect_tells_what_a_folder_holds(tiny_adapters, capsys):
    assert cli.run(["adapters", "inspect", str(tiny_adapters / "cedar")]) == 0
    text = capsys.readouterr().out
    for words in ("method         LoRA", "q_proj", "rank 8, scaling 1", "14, of rank 8 at most"):
        assert words in text


def test_inspect_says_why_a_server_would_refuse(tiny_adapters, tmp_path, capsys):
    config = json.loads((tiny_adapters / "cedar" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (tiny_adapters / "cedar" / "adapter_model.safetensors").read_bytes()
    )
    assert cli.run(["adapters", "inspect", str(tmp_path)]) == 2
    assert "use_dora" in capsys.readouterr().err
