"""Settings come from flags, environment and file, in this order, and what is wrong with them is named."""

from pathlib import Path

import pytest
from lorikeet.server.config import ServerConfig
from lorikeet.server.config_loading import flag, flag_parser, load_config
from lorikeet.server.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("LORIKEET_")]:
        monkeypatch.delenv(name)


def test_defaults():
    config = load_config([])
    assert (config.host, config.port, config.metrics_port) == ("127.0.0.1", 50051, 9464)
    assert (config.model, config.device, config.compute_dtype, config.adapters) == ("demo", "auto", "auto", ())


def test_flag_wins_over_environment_wins_over_file(tmp_path, monkeypatch):
    file = tmp_path / "lorikeet.toml"
    file.write_text("port = 1\nblock_size = 2\nmax_running = 3\n")
    monkeypatch.setenv("LORIKEET_PORT", "11")
    monkeypatch.setenv("LORIKEET_BLOCK_SIZE", "12")
    config = load_config(["--config", str(file), "--port", "21"])
    assert (config.port, config.block_size, config.max_running) == (21, 12, 3)


def test_file_named_by_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "lorikeet.toml"
    file.write_text('port = 1\nadapters = ["a", "b"]\nkv_cache_bytes = "1GiB"\nmetrics = false\n')
    monkeypatch.setenv("LORIKEET_CONFIG", str(file))
    config = load_config([])
    assert (config.port, config.adapters, config.kv_cache_bytes) == (1, (Path("a"), Path("b")), 2**30)
    assert config.metrics is False


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("256MiB", 2**28), ("1.5GiB", 3 * 2**29), ("1000000", 10**6), ("1MB", 10**6)]
)
def test_byte_sizes(text, size):
    assert load_config(["--kv-cache-bytes", text]).kv_cache_bytes == size
    assert load_config(["--adapter-host-bytes", text]).adapter_host_bytes == size


def test_adapter_directories(monkeypatch):
    assert load_config(["--adapters", "a", "--adapters", "b"]).adapters == (Path("a"), Path("b"))
    monkeypatch.setenv("LORIKEET_ADAPTERS", "c:d")
    assert load_config([]).adapters == (Path("c"), Path("d"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], ["--port", "70000", "0 to 65535"]),
        (["--port", "x"], ["--port", "'x'"]),
        (["--kv-cache-bytes", "lots"], ["--kv-cache-bytes", "lots", "512MiB"]),
        (["--adapter-device-bytes", "0"], ["--adapter-device-bytes", "'0'"]),
        (["--device", "gpu"], ["--device", "gpu", "cuda:N"]),
        (["--compute-dtype", "float16"], ["--compute-dtype", "float16", "bfloat16"]),
        (["--drain-timeout-s", "-1"], ["--drain-timeout-s", "-1"]),
        (["--drain-timeout-s", "inf"], ["--drain-timeout-s", "inf"]),
        (["--max-running", "64", "--step-tokens", "32"], ["step_tokens (32)", "max_running (64)"]),
        (["--config", "missing.toml"], ["missing.toml", "does not exist"]),
    ],
    ids=lambda value: "_".join(value) if value[0].startswith("--") else "",
)
def test_bad_flag_is_named_with_what_is_allowed(arguments, words):
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    for word in words:
        assert word in caught.value.message


def test_every_bad_setting_is_named_at_once():
    with pytest.raises(ConfigError, match=r"--port cannot be '-1'.* --block-size cannot be '0'|--block-size .* --port"):
        load_config(["--port", "-1", "--block-size", "0"])


def test_unknown_flag_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--prot", "1"])
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_unknown_environment_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("LORIKEET_BLOCKSIZE", "16")
    with pytest.raises(ConfigError, match=r"LORIKEET_BLOCKSIZE is not a setting\. Did you mean LORIKEET_BLOCK_SIZE"):
        load_config([])


def test_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("LORIKEET_PORT", "high")
    with pytest.raises(ConfigError, match="LORIKEET_PORT cannot be 'high'"):
        load_config([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_contxt = 1\n", "max_contxt in .*lorikeet.toml is not a setting. Did you mean max_context"),
        ("[engine]\nport = 1\n", "engine in .*lorikeet.toml is not a setting"),
        ("port = 'x'\n", "port in .*lorikeet.toml cannot be 'x'"),
        ("port = \n", "is not TOML"),
    ],
)
def test_bad_file_is_named(tmp_path, text, message):
    file = tmp_path / "lorikeet.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(file)])


def test_help_describes_every_setting_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = " ".join(flag_parser().format_help().split())
    for name, info in ServerConfig.model_fields.items():
        assert flag(name) in text
        assert info.description, name
        assert " ".join(info.description.split()) in text
    assert "Port that gRPC listens on, 0 to 65535; 0: any free one. [50051]" in text
    assert "[256MiB]" in text


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config([]).port = 1


def test_graphs_are_on_unless_turned_off(monkeypatch):
    assert load_config([]).cuda_graphs and not load_config(["--no-cuda-graphs"]).cuda_graphs
    monkeypatch.setenv("LORIKEET_CUDA_GRAPHS", "false")
    assert not load_config([]).cuda_graphs and load_config(["--cuda-graphs"]).cuda_graphs
