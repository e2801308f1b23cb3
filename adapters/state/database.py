"""The registry's durable half: which adapters were loaded how, what is pinned, where aliases lead. Imports no torch.

One SQLite file. In WAL mode with synchronous=FULL a commit has reached the disk when it returns, and one that a kill
interrupts has either happened as a whole or not at all.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Final

import structlog

from ..info import AliasTarget
from .durable_files import sync_directory
from .errors import AdapterStateError

_log = structlog.get_logger(__name__)

# Entry i leads from schema i to i + 1; the file's `PRAGMA user_version` says which it has. Entries are only ever added.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE adapters (
            adapter_id TEXT PRIMARY KEY NOT NULL,
            digest TEXT NOT NULL,
            source TEXT NOT NULL,
            by_call INTEGER NOT NULL,
            folder_digest TEXT NOT NULL,
            previous TEXT NOT NULL,
            pinned TEXT NOT NULL CHECK (pinned IN ('', 'host', 'device')),
            allow_zero INTEGER NOT NULL,
            allow_other_base INTEGER NOT NULL
        )""",
        """CREATE TABLE alias_targets (
            alias TEXT NOT NULL,
            position INTEGER NOT NULL,
            adapter_id TEXT NOT NULL,
            digest TEXT NOT NULL,
            weight REAL NOT NULL CHECK (weight > 0),
            PRIMARY KEY (alias, position)
        )""",
    ),
)

_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# Primary result code -> what is wrong, and what to do.
_CAUSES: Final = {
    sqlite3.SQLITE_FULL: "the disk is full; free space there and try again",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write; check it and try again",
    sqlite3.SQLITE_READONLY: "the file is read-only; make it writable and try again",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened; check its permissions and the server's limit of open files",
    sqlite3.SQLITE_BUSY: "another program keeps the file locked; close it and try again",
}
_UNKNOWN_CAUSE: Final = "SQLite reported an error that was not expected; the server's log has it"


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What is remembered of one id.

    Attributes:
        adapter_id: what users name.
        digest: its current version; empty: it was unloaded by call while its watched folder is still there.
        source: as the caller gave it, a path or a URI; empty for the folder of its name.
        by_call: loaded by call, not found in a watched folder.
        folder_digest: content last seen in the watched folder of that name; empty: none was.
        previous: digest that a rollback brings back; empty: there is none.
        pinned: tier in which it is kept, "host" or "device"; empty: in none.
        allow_zero, allow_other_base: what its load was told to accept.
    """

    adapter_id: str
    digest: str
    source: str
    by_call: bool
    folder_digest: str
    previous: str
    pinned: str
    allow_zero: bool
    allow_other_base: bool


@dataclass(frozen=True, slots=True)
class SavedAlias:
    """An alias and its targets, in the caller's order; at least one."""

    name: str
    targets: tuple[AliasTarget, ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """Everything that is remembered, sorted by id and by name."""

    adapters: tuple[SavedAdapter, ...]
    aliases: tuple[SavedAlias, ...]


_ADAPTER_COLUMNS: Final = ", ".join(field.name for field in fields(SavedAdapter))
_ADAPTER_MARKS: Final = ", ".join("?" for _ in fields(SavedAdapter))

# S608: the names come from our own class
_SELECT_ADAPTERS: Final = f"SELECT {_ADAPTER_COLUMNS} FROM adapters"  # noqa: S608
_SAVE_ADAPTER: Final = f"INSERT OR REPLACE INTO adapters ({_ADAPTER_COLUMNS}) VALUES ({_ADAPTER_MARKS})"  # noqa: S608
_SELECT_TARGETS: Final = "SELECT alias, adapter_id, digest, weight FROM alias_targets"
_SAVE_TARGET: Final = "INSERT INTO alias_targets (alias, position, adapter_id, digest, weight) VALUES (?, ?, ?, ?, ?)"


class StateDatabase:
    """The open file. Thread-safe; a change is durable when its call returns, and nobody sees one whose call failed.

    Args:
        path: of the file, created when missing; its directory exists and is used by no other process.

    Raises:
        AdapterStateError: damaged, of a newer schema, or not readable or writable; the message names the path.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._lock = threading.Lock()
        self._is_open = True
        try:
            # isolation_level=None: transactions begin and end where this module says.
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise _open_error(path, error) from None
        try:
            self._prepare(path)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._connection.close()
            raise _open_error(path, error) from None
        except BaseException:
            self._connection.close()
            raise

    def load(self) -> SavedState:
        """Everything, as of one moment."""
        with self._transaction("BEGIN") as connection:
            adapters = connection.execute(f"{_SELECT_ADAPTERS} ORDER BY adapter_id").fetchall()
            targets = connection.execute(f"{_SELECT_TARGETS} ORDER BY alias, position").fetchall()
        aliases: dict[str, list[AliasTarget]] = {}
        for alias, *target in targets:
            aliases.setdefault(alias, []).append(AliasTarget(*target))
        return SavedState(
            tuple(_adapter(row) for row in adapters),
            tuple(SavedAlias(name, tuple(of_alias)) for name, of_alias in aliases.items()),
        )

    def get(self, adapter_id: str) -> SavedAdapter | None:
        """What is remembered of an id."""
        with self._transaction("BEGIN") as connection:
            return _find_adapter(connection, adapter_id)

    def save(self, adapter: SavedAdapter) -> None:
        """Remember this of its id, in place of what was; the disk is left alone when nothing differs."""
        with self._transaction() as connection:
            if _find_adapter(connection, adapter.adapter_id) != adapter:
                connection.execute(_SAVE_ADAPTER, astuple(adapter))

    def delete(self, adapter_id: str) -> None:
        """Forget an id; nothing happens when it is unknown."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM adapters WHERE adapter_id = ?", (adapter_id,))

    def save_alias(self, alias: SavedAlias) -> None:
        """Make an alias, or move it: its old targets are gone at the same moment as the new ones are there."""
        if not alias.targets:
            raise ValueError(f"alias {alias.name!r} has no target")
        rows = [
            (alias.name, position, target.adapter_id, target.digest, target.weight)
            for position, target in enumerate(alias.targets)
        ]
        with self._transaction() as connection:
            connection.execute("DELETE FROM alias_targets WHERE alias = ?", (alias.name,))
            connection.executemany(_SAVE_TARGET, rows)

    def delete_alias(self, name: str) -> None:
        """Forget an alias; nothing happens when it is unknown."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM alias_targets WHERE alias = ?", (name,))

    def close(self) -> None:
        """Close the file; later calls raise AdapterStateError. May be called twice."""
        with self._lock:
            self._is_open = False
            # Everything is committed already; what closing adds is tidying, which may fail on a failing disk.
            with suppress(sqlite3.Error):
                self._connection.close()

    def _prepare(self, path: Path) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise _damaged(str(path))
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise AdapterStateError(
                f"{path} was written by a newer Lorikeet (schema {version}; this one knows schemas up to "
                f"{len(_MIGRATIONS)}). Start that Lorikeet, or give this one another --state-dir."
            )
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            with _transaction(connection, "BEGIN IMMEDIATE"):
                for statement in statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
        try:
            sync_directory(path.parent)
        except OSError:
            raise AdapterStateError(f"The disk of {path} failed to store it.") from None

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """One transaction under the lock, with SQLite's errors turned into ours."""
        with self._lock:
            if not self._is_open:
                raise AdapterStateError("The server is stopping; its adapters can no longer be changed.")
            try:
                with _transaction(self._connection, begin):
                    yield self._connection
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise  # a bug of ours, not the disk's fault
            except (sqlite3.Error, UnicodeDecodeError) as error:
                code = _primary_code(error)
                _log.error("adapter_state_failed", error=repr(error))
                if code in _DAMAGED:
                    raise _damaged(self._name) from error
                cause = _CAUSES.get(code, _UNKNOWN_CAUSE)
                raise AdapterStateError(f"The server's record of its adapters failed: {cause}.") from error


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite has already rolled back after some errors, and says so
            connection.execute("ROLLBACK")
        raise


def _find_adapter(connection: sqlite3.Connection, adapter_id: str) -> SavedAdapter | None:
    row = connection.execute(f"{_SELECT_ADAPTERS} WHERE adapter_id = ?", (adapter_id,)).fetchone()
    return None if row is None else _adapter(row)


def _adapter(row: tuple[str, str, str, int, str, str, str, int, int]) -> SavedAdapter:
    adapter_id, digest, source, by_call, folder_digest, previous, pinned, allow_zero, allow_other_base = row
    return SavedAdapter(
        adapter_id=adapter_id,
        digest=digest,
        source=source,
        by_call=bool(by_call),
        folder_digest=folder_digest,
        previous=previous,
        pinned=pinned,
        allow_zero=bool(allow_zero),
        allow_other_base=bool(allow_other_base),
    )


def _primary_code(error: sqlite3.Error | UnicodeDecodeError) -> int:
    """SQLite's result code without its extension; 0 for an error of the Python module itself."""
    if isinstance(error, UnicodeDecodeError):  # of a damaged schema, which SQLite quotes in its message
        return sqlite3.SQLITE_CORRUPT
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _open_error(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> AdapterStateError:
    code = _primary_code(error)
    _log.error("adapter_state_failed", error=repr(error))
    if code in _DAMAGED:
        return _damaged(str(path))
    return AdapterStateError(f"{path} cannot be opened: {_CAUSES.get(code, _UNKNOWN_CAUSE)}.")


def _damaged(file: str) -> AdapterStateError:
    return AdapterStateError(
        f"{file} is damaged or no database. Stop the server, move the file away (and those of its name with -wal and "
        "-shm behind it) and start again: watched folders are found again, but adapters that were loaded by call must "
        "be loaded again, and pins and aliases be set again."
    )
