"""On a CPU, what does not fit beside the base is refused at start; nobody would be told before it fills up."""

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
import torch
from lorikeet.server import app
from lorikeet.server.config import GIB, MIB, ServerConfig
from lorikeet.server.errors import ConfigError
from lorikeet.server.host_memory import free_host_memory
from lorikeet.server.memory_plan import FreeMemory, MemorySettings, ModelSize, demands, plan_host_kv_cache
from lorikeet.server.resolve import resolve_compute

# SmolLM2-135M in fp32.
SMALL = ModelSize(
    hidden=576,
    widest=576 + 3072,
    largest_weight=576 * 3072,
    vocab=49152,
    num_sites=121,
    max_slices=3,
    itemsize=4,
    kv_block_bytes=2 * 30 * 3 * 64 * 16 * 4,
)
CONTEXT_BLOCKS = 512
# A limit that means none, in version 1: the largest multiple of a page.
NO_LIMIT = 2**63 - 4096


def settings(kv: int | None = None, arena: int = 256 * MIB, max_blocks: int = CONTEXT_BLOCKS) -> MemorySettings:
    return MemorySettings(kv, arena, 1024, 512, 128, max_blocks, None)


REST = sum(demands(SMALL, settings()).values())


def machine(count: int) -> FreeMemory:
    return FreeMemory(count, "This machine")


def planned(of: MemorySettings, free: int) -> tuple[int, list]:
    with structlog.testing.capture_logs() as logs:
        return plan_host_kv_cache(SMALL, of, machine(free)), logs


def test_automatic_cache_is_smaller_where_memory_is_short_and_never_refused():
    assert planned(settings(), REST + GIB) == (512 * MIB, [])
    longest = CONTEXT_BLOCKS * SMALL.kv_block_bytes
    between = (longest + 512 * MIB) // 2
    kv, logs = planned(settings(), REST + int(between / 0.9))
    assert abs(kv - between) < 2 and "less than on a larger machine" in logs[0]["hint"]
    for free in (REST + longest - 1, 1, 0):
        kv, logs = planned(settings(), free)
        assert kv == longest and "lower --kv-cache-bytes or" in logs[0]["hint"]
    # A longest context of more than that: the same cache as with enough memory.
    assert planned(settings(max_blocks=10**6), 0)[0] == 512 * MIB


def test_cache_and_arena_beyond_the_default_are_refused_unless_they_fit():
    for kv, arena in ((60 * GIB, 256 * MIB), (100 * 2**40, 256 * MIB), (None, 3 * GIB), (769 * MIB, 1), (1, GIB)):
        of = settings(kv, arena)
        least = CONTEXT_BLOCKS * SMALL.kv_block_bytes if kv is None else kv
        exactly = sum(demands(SMALL, of).values()) + least
        assert planned(of, exactly)[0] == least
        with pytest.raises(ConfigError, match=r"This machine has [\d.]+ GiB free .* needed \(KV cache [\d.]+ GiB"):
            planned(of, exactly - 1)


def test_message_names_a_value_that_fits():
    with pytest.raises(ConfigError) as caught:
        planned(settings(60 * GIB), 20 * GIB)
    found = re.search(r"--kv-cache-bytes by ([\d.]+) GiB, to (\d+)MiB", caught.value.message)
    assert found is not None
    mib = int(found[2])
    assert float(found[1]) == pytest.approx(60 - mib / 1024, abs=0.01)
    assert planned(settings(mib * MIB), 20 * GIB) == (mib * MIB, [])
    with pytest.raises(ConfigError):
        planned(settings((mib + 1) * MIB), 20 * GIB)


def test_given_cache_no_larger_than_by_default_is_taken_with_a_warning():
    kv, logs = planned(settings(512 * MIB), 100 * MIB)
    assert kv == 512 * MIB and logs[0]["log_level"] == "warning"


class FakeSystem:
    """/proc and the mounted control groups, as files."""

    def __init__(self, root: Path, available: int | None, groups: str) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        if available is not None:
            (self.proc / "meminfo").write_text(
                f"MemTotal:       24684092 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total:       0\n"
            )
        (self.proc / "self" / "cgroup").write_text(groups)

    def group(self, path: str, version: int, limit: int | str, used: int, cached: int = 0) -> None:
        directory = self.cgroups / path
        directory.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        prefix = "" if version == 2 else "total_"
        for name, value in zip(names, (limit, used), strict=True):
            (directory / name).write_text(f"{value}\n")
        (directory / "memory.stat").write_text(
            f"anon 1\n{prefix}inactive_file {cached - cached // 3}\n{prefix}active_file {cached // 3}\n"
        )

    def free(self) -> tuple[int, bool] | None:
        found = free_host_memory(self.proc, self.cgroups)
        return found and (found.nbytes, "control group" in found.place)


def test_machine_without_limits(tmp_path):
    system = FakeSystem(tmp_path, 20 * GIB, "0::/\n")
    assert system.free() == (20 * GIB, False)


def test_system_that_says_nothing(tmp_path):
    assert FakeSystem(tmp_path / "one", None, "").free() is None
    assert free_host_memory(tmp_path / "none", tmp_path / "none") is None
    assert FakeSystem(tmp_path / "odd", GIB, "nonsense\n3:memory\n:::\n").free() == (GIB, False)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_on_the_way_counts(version, tmp_path):
    lines = "0::/a/b/c\n" if version == 2 else "5:cpu,cpuacct:/x\n4:memory:/a/b/c\n0::/a\n"
    base = "" if version == 2 else "memory/"
    system = FakeSystem(tmp_path, 20 * GIB, lines)
    unlimited = "max" if version == 2 else NO_LIMIT
    system.group(f"{base}a/b/c", version, unlimited, 5 * GIB)
    assert system.free() == (20 * GIB, False)
    system.group(f"{base}a", version, 9 * GIB, 3 * GIB, cached=GIB)
    assert system.free() == (7 * GIB, True)
    system.group(f"{base}a/b/c", version, 4 * GIB, 3 * GIB)
    assert system.free() == (GIB, True)
    system.group(f"{base}a/b", version, 4 * GIB, 5 * GIB)
    assert system.free() == (0, True)
    system.group(f"{base}a/other", version, 0, GIB)
    system.group(f"{base}a/b", version, unlimited, 0)
    assert system.free() == (GIB, True)


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/", "/../other"])
def test_container_sees_its_own_group_as_the_root(path, tmp_path):
    system = FakeSystem(tmp_path, 20 * GIB, f"0::{path}\n")
    system.group(".", 2, 2 * GIB, GIB)
    system.group("other", 2, 0, 0)
    assert system.free() == (GIB, True)


def test_this_system_says_something():
    found = free_host_memory()
    assert found is not None and found.nbytes > 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOMEM, "Cannot allocate memory"), ConfigError), (OSError(errno.EACCES, "no"), PermissionError)],
    ids=["no memory", "something else"],
)
def test_memory_that_the_system_does_not_give_is_said_in_words(error, expected, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(app, "load_base", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(app, "check_unproven_family", lambda base: None)
    monkeypatch.setattr(app, "assemble", refuse)
    config = ServerConfig(device="cpu", threads=torch.get_num_threads())
    assert resolve_compute(config).device.type == "cpu"
    with pytest.raises(expected) as caught:
        app.run_server(config, "base", "", lambda ready: None)
    if expected is ConfigError:
        assert caught.value.message.startswith("This machine ran out of memory")
