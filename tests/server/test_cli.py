"""The command line without a server: help, start-up cost, and errors as one line."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lorikeet.server import cli, cli_serve
from lorikeet.server.cli_parser import build_parser
from lorikeet.server.cli_serve import check_merge_dir
from lorikeet.server.errors import BaseModelError, ConfigError

LORIKEET = [sys.executable, "-c", "from lorikeet.server.cli import main; main()"]


# One of every command that talks to a server.
CLIENT_COMMANDS = [
    command.split()
    for command in (
        "generate x", "health", "adapters list", "adapters get a", "adapters load a", "adapters unload a",
        "adapters rollback a", "adapters prefetch a", "adapters pin a", "adapters unpin a", "adapters alias set a b",
        "adapters alias delete a", "adapters alias list", "adapters merge start a --output b --unverified",
        "adapters merge list", "adapters merge get a", "adapters merge cancel a", "adapters merge delete a",
    )
]  # fmt: skip


def run(*arguments):
    return subprocess.run([*LORIKEET, *arguments], capture_output=True, text=True, timeout=60)


ADAPTER_COMMANDS = (
    "list", "get", "load", "unload", "rollback", "prefetch", "pin", "unpin", "alias", "merge", "inspect", "golden",
)  # fmt: skip
ALIAS_COMMANDS = ("set", "delete", "list")
MERGE_COMMANDS = ("start", "list", "get", "cancel", "delete")
COMMANDS = [
    *([name] for name in ("serve", "generate", "adapters", "health", "prepare-demo")),
    *(["adapters", name] for name in ADAPTER_COMMANDS),
    *(["adapters", "alias", name] for name in ALIAS_COMMANDS),
    *(["adapters", "merge", name] for name in MERGE_COMMANDS),
]


def help_of(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help(command, capsys):
    assert "lorikeet" in help_of(command, capsys)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != ["serve"]], ids=" ".join)
def test_every_flag_says_what_it_is_and_what_without_it(command):
    """Switches are off by default, and positional arguments have none; every other flag names its default."""
    parser = build_parser()
    for name in command:
        [subcommands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = subcommands.choices[name]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, action
        has_default = action.option_strings and action.nargs != 0 and not action.required
        if has_default and not action.dest.startswith(("stop", "seed", "system")):
            assert re.search(r"\[.+\]$", action.help), action.option_strings


@pytest.mark.parametrize(
    ("command", "subcommands"),
    [
        ([], ["serve", "generate", "adapters", "health"]),
        (["adapters"], ADAPTER_COMMANDS),
        (["adapters", "alias"], ALIAS_COMMANDS),
        (["adapters", "merge"], MERGE_COMMANDS),
    ],
    ids=["lorikeet", "adapters", "alias", "merge"],
)
def test_help_lists_the_subcommands(command, subcommands, capsys):
    text = help_of(command, capsys)
    for name in subcommands:
        assert re.search(rf"^    {name}\b", text, re.MULTILINE)


def test_help_states_the_default_tolerance(capsys):
    from lorikeet.adapters.golden import DEFAULT_TOLERANCE, MAX_TOLERANCE

    text = " ".join(help_of(["adapters", "golden"], capsys).split())
    assert f"above 0 to {MAX_TOLERANCE:g} [{DEFAULT_TOLERANCE:g}]" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--help"],
        ["serve", "--help"],
        ["adapters", "golden", "--help"],
        *([*words, "--address", "127.0.0.1:1", "--client", "team-a"] for words in CLIENT_COMMANDS),
    ],
    ids=" ".join,
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


def test_client_name_that_cannot_be_sent_is_refused_whoever_gave_it(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(["health", "--client", "a b"])
    assert "--client: 'a b' is no client name; allowed: 1 to 128 printable" in capsys.readouterr().err
    monkeypatch.setenv("LORIKEET_CLIENT", "käse")
    with pytest.raises(SystemExit, match="2"):
        cli.run(["health"])
    assert "It may come from $LORIKEET_CLIENT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment", "name"),
    [([], None, ""), ([], "team-a", "team-a"), (["--client", "b"], "team-a", "b"), (["--client", ""], "team-a", "")],
)
def test_client_name_of_flag_or_environment_goes_with_every_command(monkeypatch, arguments, environment, name):
    if environment is not None:
        monkeypatch.setenv("LORIKEET_CLIENT", environment)
    for command in CLIENT_COMMANDS:
        assert build_parser().parse_args([*command, *arguments]).client == name


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_timeout_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(["health", "--timeout", seconds])
    assert "--timeout" in capsys.readouterr().err


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


def test_merge_directory_is_made_and_must_be_writable_and_no_adapters_folder(tmp_path):
    check_merge_dir(tmp_path / "merged" / "here", [tmp_path / "adapters"])
    assert (tmp_path / "merged" / "here").is_dir()
    (tmp_path / "file").write_text("")
    for directory, said in ((tmp_path / "file", "no directory"), (tmp_path / "adapters" / "here", "give another")):
        with pytest.raises(ConfigError, match=said):
            check_merge_dir(directory, [tmp_path / "adapters"])
    assert not (tmp_path / "adapters").exists()


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


def test_local_commands_get_their_arguments(monkeypatch):
    from lorikeet.server import cli_golden, cli_inspect

    calls = []
    monkeypatch.setattr(cli_inspect, "inspect", lambda *arguments: calls.append(arguments) or 0)
    monkeypatch.setattr(cli_golden, "golden", lambda *arguments: calls.append(arguments) or 0)
    for arguments in (
        ["inspect", "DIR"],
        ["inspect", "DIR", "--model", "M", "--json"],
        ["golden", "DIR", "--model", "M"],
        ["golden", "DIR", "--model", "M", "--prompt", "a", "--prompt", "b", "--prompts", "F", "--tolerance", "0.5"],
    ):
        assert cli.run(["adapters", *arguments]) == 0
    folder = Path("DIR")
    assert calls == [
        (folder, None, False),
        (folder, "M", True),
        (folder, "M", [], None, None),
        (folder, "M", ["a", "b"], Path("F"), 0.5),
    ]


def test_inspect_tells_what_a_folder_holds(tiny_adapters, capsys):
    assert cli.run(["adapters", "inspect", str(tiny_adapters / "cedar")]) == 0
    text = capsys.readouterr().out
    for words in ("LoRA", "q_proj", "rank 8 at most"):
        assert words in text


def test_inspect_says_why_a_server_would_refuse(tiny_adapters, tmp_path, capsys):
    config = json.loads((tiny_adapters / "cedar" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (tiny_adapters / "cedar" / "adapter_model.safetensors").read_bytes()
    )
    assert cli.run(["adapters", "inspect", str(tmp_path)]) == 2
    assert "use_qalora" in capsys.readouterr().err
