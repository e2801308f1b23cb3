"""A merged model has its name when it is complete; whatever happens before, nothing is left."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lorikeet.adapters.merge import staging as staging_module
from lorikeet.adapters.merge.errors import (
    MergeCancelledError,
    MergeDiskError,
    MergeOutputExistsError,
    MergeUnwritableError,
)
from lorikeet.adapters.merge.staging import check_output, check_room, staged

CHILD = """
import sys, time
from pathlib import Path
from lorikeet.adapters.merge.staging import staged
with staged(Path(sys.argv[1])) as staging:
    (staging / "model.safetensors").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_gets_its_name_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as staging:
        (staging / "config.json").write_text("{}")
        assert not out.exists() and staging.parent == tmp_path and staging.name.startswith(".")
    assert names(tmp_path) == ["out"] and names(out) == ["config.json"]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MergeCancelledError("cancelled"), MergeCancelledError),
        (ValueError("a bug"), ValueError),
        (OSError(errno.ENOSPC, "No space left on device"), MergeDiskError),
        (OSError(errno.EFBIG, "File too large"), MergeDiskError),
        (OSError(errno.EROFS, "Read-only file system"), MergeUnwritableError),
    ],
    ids=["interrupted", "cancelled", "bug", "disk-full", "file-too-large", "read-only"],
)
def test_nothing_is_left_of_what_fails(error: BaseException, seen: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(seen), staged(tmp_path / "out") as staging:
        (staging / "config.json").write_text("{}")
        raise error
    assert names(tmp_path) == []


def test_what_appears_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MergeOutputExistsError, match="appeared"), staged(out) as staging:
        (staging / "config.json").write_text("{}")
        out.mkdir()
    assert names(tmp_path) == ["out"] and names(out) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t*"
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(out)], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
        (left,) = names(tmp_path)
        with staged(out) as staging:
            assert left in names(tmp_path)
            (staging / "config.json").write_text("{}")
        (out / "config.json").unlink()
        out.rmdir()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert left in names(tmp_path)
    others = (f".other{left[left.index('.merging-') :]}", f"{left}0", f".{out.name}.merging-notes")
    for name in others:
        (tmp_path / name).mkdir()
    with staged(out) as staging:
        (staging / "config.json").write_text("{}")
    assert names(tmp_path) == sorted((*others, out.name))  # another output's, or a user's, are not ours to remove


def test_what_is_complete_is_not_said_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(directory: Path) -> None:
        if directory == tmp_path:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staging_module, "sync_directory", sync)
    with pytest.raises(MergeUnwritableError, match="is complete, but"), staged(tmp_path / "out") as staging:
        (staging / "config.json").write_text("{}")
    assert names(tmp_path) == ["out"]


def test_a_directory_that_is_being_written_is_locked(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        descriptor = os.open(staging, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for taken in ("file", "."):
        with pytest.raises(MergeOutputExistsError, match="nothing is overwritten"):
            check_output(tmp_path / taken)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MergeOutputExistsError):
        check_output(tmp_path / "link")
    with pytest.raises(MergeUnwritableError, match="missing"):
        check_output(tmp_path / "no" / "out")
    check_output(tmp_path / "out")


def test_a_disk_without_room_is_known_before(tmp_path: Path) -> None:
    check_room(tmp_path / "out", 1000)
    with pytest.raises(MergeDiskError, match=r"take about 1000000000\.00 GB"):
        check_room(tmp_path / "out", 10**18)
