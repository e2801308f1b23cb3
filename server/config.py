"""The one settings model of `lorikeet serve`: flags, `LORIKEET_...` environment variables and a TOML file.

A flag wins over an environment variable, which wins over the file, which wins over the default. A key that does not
exist is an error in all three (config_loading.py). Values of "auto" are resolved in resolve.py and logged at start.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ..adapters.sources.locate import SourcePolicy
from .addresses import DEFAULT_HOST, DEFAULT_METRICS_PORT, DEFAULT_PORT

ENV_PREFIX = "LORIKEET_"
CONFIG_ENV = "LORIKEET_CONFIG"

MIB = 2**20
GIB = 2**30
DEFAULT_ADAPTER_DEVICE_BYTES = 256 * MIB


def _field(group: str, default: Any, description: str, **constraints: Any) -> Any:
    """A setting; `group` is its heading in `--help`."""
    return Field(default, description=description, json_schema_extra={"group": group}, **constraints)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lorikeet`, or `~/.cache/lorikeet`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorikeet"


class ServerConfig(BaseSettings):
    """Everything that can be set about a server."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str = _field(
        "Model",
        "demo",
        "Base model: a Hugging Face directory or hub id, in 16 bit or already in bitsandbytes 4 bit; `demo` is the "
        "embedded SmolLM2-135M-Instruct.",
    )
    device: str = _field(
        "Model",
        "auto",
        "Where the model runs: auto, cpu, cuda or cuda:N. auto takes CUDA when there is one.",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = _field(
        "Model",
        "auto",
        "Type that the NF4 weights are multiplied in: auto, bfloat16 or float32. auto is bfloat16 on CUDA and on CPUs "
        "with AVX512-BF16, else float32.",
    )
    max_context: int | None = _field(
        "Model", None, "Most tokens of prompt plus output, 1 or more; unset: what the model was trained for.", ge=1
    )
    threads: int = _field("Model", 0, "CPU threads of the model, 0 to 1024; 0: one for each core.", ge=0, le=1024)
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Where the demo base and the quantized form of 16-bit models are kept.",
        json_schema_extra={"group": "Model", "default_text": "~/.cache/lorikeet"},
    )
    demo_wheel: Path | None = _field(
        "Model", None, "A copy of the wheel that the demo base comes in, for machines that reach no package index."
    )

    adapters: Annotated[tuple[Path, ...], NoDecode] = _field(
        "Adapters",
        (),
        "Directory whose subfolders are adapters; watched while the server runs. May be given more than once "
        f"(separated by `{os.pathsep}` in the environment, an array in the file).",
    )
    adapter_device_bytes: ByteSize = _field(
        "Adapters",
        ByteSize(DEFAULT_ADAPTER_DEVICE_BYTES),
        "Device memory for adapters, in bytes or as 256MiB, 2GiB.",
        gt=0,
    )
    adapter_host_bytes: ByteSize = _field(
        "Adapters", ByteSize(GIB), "Host memory for adapters, in bytes or as 256MiB, 2GiB.", gt=0
    )
    adapter_slots: int = _field(
        "Adapters",
        1024,
        "Most adapters on the device at a time, 1 to 65536; a slot costs only table entries.",
        ge=1,
        le=65536,
    )
    adapter_drain_timeout_s: float = _field(
        "Adapters",
        300.0,
        "Seconds that requests may go on with an adapter version after it was unloaded or replaced, 0 or more.",
        ge=0,
        allow_inf_nan=False,
    )

    adapter_sources: Annotated[tuple[str, ...], NoDecode] = _field(
        "Adapters",
        (),
        "Prefix of URIs that adapters may be loaded from by call, such as hf://my-org/ or s3://bucket/adapters/. May "
        "be given more than once (separated by spaces in the environment, an array in the file). None: directories "
        "only.",
    )
    adapter_fetch_bytes: ByteSize = _field(
        "Adapters", ByteSize(4 * GIB), "Largest adapter fetched from a URI, in bytes or as 256MiB, 2GiB.", gt=0
    )
    adapter_fetch_timeout_s: float = _field(
        "Adapters", 600.0, "Seconds that fetching an adapter may take, above 0.", gt=0, allow_inf_nan=False
    )
    adapter_store_bytes: ByteSize = _field(
        "Adapters",
        ByteSize(4 * GIB),
        "Disk space for copies of adapter versions, in bytes or as 256MiB, 2GiB; rollback, aliases and adapters from "
        "URIs rest on them. 0: none are kept.",
        ge=0,
    )
    adapter_allow_zero: bool = _field(
        "Adapters", False, "Whether adapters that change nothing are served, from watched directories too."
    )
    adapter_allow_other_base: bool = _field(
        "Adapters",
        False,
        "Whether adapters that say they were trained for another base are served if their shapes fit, from watched "
        "directories too.",
    )
    base_names: Annotated[tuple[str, ...], NoDecode] = _field(
        "Adapters",
        (),
        "Another name that adapters may know the base by. May be given more than once (separated by spaces in the "
        "environment, an array in the file).",
    )
    state_dir: Path | None = _field(
        "Adapters",
        None,
        "Directory of what survives a restart: adapters loaded by call, rollbacks, pins, aliases. One server each. "
        "Unset: a private one that goes with the process.",
    )

    merge_dir: Path | None = _field(
        "Merging",
        None,
        "Directory that MergeService writes merged models into, made if need be. Unset: it merges nothing.",
    )
    merge_max_queued: int = _field(
        "Merging",
        8,
        "Most merges that wait while one runs; one more gets RESOURCE_EXHAUSTED. 0 to 1000.",
        ge=0,
        le=1000,
    )
    merge_threads: int = _field(
        "Merging",
        1,
        "CPU threads of a merge, 1 to 1024.",
        ge=1,
        le=1024,
    )
    merge_priority: Literal["idle", "low", "normal"] = _field(
        "Merging",
        "low",
        "When a merge gets a core: low, when nobody else wants it and else for a tenth of the time, in turns of a few "
        "milliseconds, so that it ends on a machine that is never idle, too; idle, only when nobody else wants it; "
        "normal, like the server.",
    )

    policy: Path | None = _field(
        "Policy",
        None,
        "TOML file that says who may use and manage which adapter, and each adapter's share and caps; read again on "
        "SIGHUP. Unset: everybody may do everything, equal shares, no caps.",
    )
    max_wait_s: float = _field(
        "Policy",
        30.0,
        "Seconds an adapter may wait without any request of it being admitted before its oldest request goes first, "
        "whatever the shares say; 0 or more.",
        ge=0,
        allow_inf_nan=False,
    )

    kv_cache_bytes: Literal["auto"] | ByteSize = _field(
        "Engine",
        "auto",
        "KV cache, in bytes or as 512MiB, 2GiB. auto is 90 % of the device memory left beside weights, adapters, "
        "workspace and graphs on CUDA; 512MiB on CPU, or less where memory is short.",
    )
    block_size: int = _field("Engine", 16, "Tokens in a KV block, 1 to 256.", ge=1, le=256)
    step_tokens: int = _field(
        "Engine", 512, "Most tokens, of prompts and outputs together, in one forward pass, 1 to 65536.", ge=1, le=65536
    )
    max_running: int = _field("Engine", 128, "Most requests in one forward pass, 1 to 4096.", ge=1, le=4096)
    max_slowdown: float = _field(
        "Engine",
        0.0,
        "How many times as long as without them a forward pass of outputs may take with tokens of prompts beside them, "
        "above 1; prompts get a sixteenth of step_tokens whatever that takes. 0: no bound.",
        ge=0,
        allow_inf_nan=False,
    )
    prefix_cache: bool = _field(
        "Engine",
        True,
        "Whether requests of one adapter share the KV of prompts that begin alike, which then is computed only once.",
    )
    cuda_graphs: bool = _field(
        "Engine",
        True,
        "Whether steps on CUDA are captured as graphs: faster, for some seconds at start and some hundred MiB "
        "of device memory.",
    )
    max_waiting: int = _field(
        "Engine", 1024, "Most requests waiting; one more gets RESOURCE_EXHAUSTED. 1 to 1000000.", ge=1, le=1_000_000
    )

    host: str = _field("Network", DEFAULT_HOST, "Address that gRPC listens on.", min_length=1)
    port: int = _field(
        "Network", DEFAULT_PORT, "Port that gRPC listens on, 0 to 65535; 0: any free one.", ge=0, le=65535
    )
    max_message_bytes: ByteSize = _field(
        "Network", ByteSize(4 * MIB), "Largest gRPC message taken, in bytes or as 4MiB, up to 1GiB.", gt=0, le=GIB
    )
    drain_timeout_s: float = _field(
        "Network", 30.0, "Seconds that requests may go on after SIGTERM, 0 or more.", ge=0, allow_inf_nan=False
    )
    metrics: bool = _field("Network", True, "Whether Prometheus metrics are served.")
    metrics_host: str = _field("Network", DEFAULT_HOST, "Address that /metrics listens on.", min_length=1)
    metrics_port: int = _field(
        "Network", DEFAULT_METRICS_PORT, "Port that /metrics listens on, 0 to 65535; 0: any free one.", ge=0, le=65535
    )
    metrics_max_adapters: int = _field(
        "Network", 100, "Adapters with a metrics label of their own, 0 or more; later ones count as `other`.", ge=0
    )

    log_level: Literal["debug", "info", "warning", "error"] = _field(
        "Logs", "info", "Least serious messages logged: debug, info, warning or error."
    )
    log_format: Literal["auto", "json", "console"] = _field(
        "Logs", "auto", "json, console, or auto: console on a terminal, else json."
    )

    config: Path | None = _field("Logs", None, f"TOML file with any of these settings; also ${CONFIG_ENV}.")

    @field_validator("adapters", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("adapter_sources", "base_names", mode="before")
    @classmethod
    def _split_words(cls, value: object) -> object:
        return value.split() if isinstance(value, str) else value

    @field_validator("adapter_sources", mode="after")
    @classmethod
    def _check_prefixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        SourcePolicy((), value)
        return value

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens ({self.step_tokens}) is below max_running ({self.max_running}); every running request "
                "needs room for a token in a step."
            )
        if 0 < self.max_slowdown <= 1:
            raise ValueError(f"max_slowdown ({self.max_slowdown}) must be above 1, or 0 for no bound.")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that one of these names."""
        path = init_settings().get("config") or env_settings().get("config")
        file = () if path is None else (TomlConfigSettingsSource(settings_cls, toml_file=Path(path)),)
        return init_settings, env_settings, *file
