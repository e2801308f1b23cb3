"""How much memory this process may still take: what the machine has left, or its control groups if that is less.

A limit may be set on a group or on any that it lies in, and Linux enforces all of them by killing. Files in the page
cache count as free, in a group as on the machine: they make room for whoever asks. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from .memory_plan import FreeMemory

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """What a version of control groups calls its files, and the counts in memory.stat of pages of the page cache."""

    limit: str
    used: str
    file_pages: tuple[str, str]


_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> FreeMemory | None:
    """What this process may still take; None where the system does not say.

    Args:
        proc: of the system.
        cgroups: where control groups are mounted: version 2, or version 1 with a folder for each controller.
    """
    found = []
    available = _table(proc / "meminfo").get("MemAvailable:")
    if available is not None:
        found.append(FreeMemory(available * 1024, "This machine"))
    for directory, files in _groups(proc, cgroups):
        limit, used = _number(directory / files.limit), _number(directory / files.used)
        if limit is not None and used is not None:
            stat = _table(directory / "memory.stat")
            cached = sum(stat.get(name, 0) for name in files.file_pages)
            found.append(FreeMemory(max(0, limit - used + cached), "This process's control group (its memory limit)"))
    return min(found, default=None)


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of the groups of this process that may limit its memory, those that they lie in included."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        # In a container, the path may be the host's, while what is mounted begins with the container's own group; one
        # that leads out of what is mounted begins with "..".
        parts = [part for part in path.split("/") if part]
        inside = [] if ".." in parts else parts
        for count in range(len(inside) + 1):
            yield root.joinpath(*inside[:count]), files


def _table(file: Path) -> Mapping[str, int]:
    """A file of lines that are a name and a number, perhaps with a unit."""
    words = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1 and pair[1].isdecimal()}


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, such as "max"."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
