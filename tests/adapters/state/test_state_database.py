"""The registry's durable half: a dict that survives restarts, and says clearly when it cannot."""

import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from lorikeet.adapters.errors import Code
from lorikeet.adapters.info import AliasTarget
from lorikeet.adapters.state import database as database_module
from lorikeet.adapters.state.database import SavedAdapter, SavedAlias, SavedState, StateDatabase
from lorikeet.adapters.state.errors import AdapterStateError

from .children import Model, random_adapter, random_alias

ADAPTER = SavedAdapter("support-bot", "ab" * 32, "teams/support", True, "", "cd" * 32, "host", False, True)
ALIAS = SavedAlias("prod", (AliasTarget("support-bot", "ab" * 32, 9.0), AliasTarget("support-bot", "cd" * 32, 0.1)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.sqlite"


@pytest.fixture
def database(path):
    database = StateDatabase(path)
    yield database
    database.close()


def reopen(database, path):
    database.close()
    return StateDatabase(path)


def test_state_package_imports_no_torch():
    code = "import sys, lorikeet.adapters.state.state_dir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_survives_a_restart(database, path):
    database.save(ADAPTER)
    database.save_alias(ALIAS)
    database = reopen(database, path)
    assert database.load() == SavedState((ADAPTER,), (ALIAS,))
    assert database.get("support-bot") == ADAPTER
    assert database.get("other") is None


def test_empty_at_first(database):
    assert database.load() == SavedState((), ())


def test_commits_reach_the_disk(database):
    """What the crash tests cannot see: a kill leaves the page cache, a power cut does not."""
    connection = database._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_saving_the_same_again_writes_nothing(database, path):
    database.save(ADAPTER)
    log = path.with_name("state.sqlite-wal")
    size = log.stat().st_size
    for _ in range(10):
        database.save(ADAPTER)
    assert log.stat().st_size == size
    database.save(replace(ADAPTER, pinned="device"))
    assert log.stat().st_size > size


def test_moving_an_alias_leaves_no_old_target(database):
    database.save_alias(ALIAS)
    moved = SavedAlias("prod", ALIAS.targets[1:])
    database.save_alias(moved)
    assert database.load().aliases == (moved,)


def test_forgetting_what_is_unknown_is_harmless(database):
    database.delete("unknown")
    database.delete_alias("unknown")
    assert database.load() == SavedState((), ())


def test_a_refused_change_leaves_everything_as_it_was(database):
    """Our own bugs are no disk errors, and they break no transaction."""
    database.save(ADAPTER)
    database.save_alias(ALIAS)
    with pytest.raises(sqlite3.IntegrityError):
        database.save(replace(ADAPTER, pinned="attic"))
    with pytest.raises(sqlite3.IntegrityError):
        database.save_alias(SavedAlias("prod", (ALIAS.targets[0], AliasTarget("support-bot", "ef" * 32, 0.0))))
    with pytest.raises(ValueError, match="no target"):
        database.save_alias(SavedAlias("prod", ()))
    assert database.load() == SavedState((ADAPTER,), (ALIAS,))


def test_after_close_calls_fail_clearly(database):
    database.close()
    database.close()
    for call in (database.load, lambda: database.save(ADAPTER), lambda: database.get("x")):
        with pytest.raises(AdapterStateError, match="stopping"):
            call()


def test_threads_lose_nothing(database):
    start = threading.Barrier(8)

    def work(number):
        rng = random.Random(number)
        start.wait()
        for i in range(10):
            adapter = random_adapter(rng, f"t{number}-{i}")
            database.save(adapter)
            assert database.get(adapter.adapter_id) == adapter
            database.save_alias(random_alias(rng, f"alias-{number}"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = database.load()
    assert len(state.adapters) == 80 and len(state.aliases) == 8


def test_a_file_of_a_newer_lorikeet_is_refused_and_untouched(database, path):
    database.save(ADAPTER)
    database.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(AdapterStateError, match=r"newer Lorikeet \(schema 7.*--state-dir"):
        StateDatabase(path)
    assert path.read_bytes() == content


def test_an_older_schema_is_brought_forward_keeping_its_content(database, path, monkeypatch):
    database.save(ADAPTER)
    step = ("CREATE TABLE notes (text TEXT)", "INSERT INTO notes VALUES ('from schema 1')")
    monkeypatch.setattr(database_module, "_MIGRATIONS", (*database_module._MIGRATIONS, step))
    for _ in range(2):  # the second time there is nothing left to do
        database = reopen(database, path)
        assert database.load().adapters == (ADAPTER,)
        assert database._connection.execute("SELECT text FROM notes").fetchall() == [("from schema 1",)]
        assert database._connection.execute("PRAGMA user_version").fetchone() == (2,)
    database.close()


def test_a_failed_migration_changes_nothing(database, path, monkeypatch):
    database.save(ADAPTER)
    database.close()
    step = ("CREATE TABLE notes (text TEXT)", "INSERT INTO nowhere VALUES (1)")
    with monkeypatch.context() as patch:
        patch.setattr(database_module, "_MIGRATIONS", (*database_module._MIGRATIONS, step))
        with pytest.raises(AdapterStateError, match="cannot be opened"):
            StateDatabase(path)
    database = StateDatabase(path)
    assert database.load().adapters == (ADAPTER,)
    assert database._connection.execute("SELECT name FROM sqlite_master WHERE name = 'notes'").fetchall() == []
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"not a database at all".ljust(len(content), b"."),
        lambda content: content[: len(content) // 2],
        lambda content: content[:200] + os.urandom(len(content) - 200),
        lambda content: content.replace(b"CREATE TABLE alias", b"CREATE \x80ABLE alias"),
        lambda content: content[:-4096] + bytes(4096),
    ],
    ids=["other content", "cut off", "random pages", "a schema that is no text", "a lost page"],
)
def test_a_damaged_file_says_what_to_do(database, path, damage):
    for i in range(100):
        database.save(random_adapter(random.Random(i), f"a{i}"))
    database.close()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterStateError, match="loaded by call must be loaded again") as caught:
        StateDatabase(path)
    assert str(path) in caught.value.message and "move the file away" in caught.value.message
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "ADAPTER_STATE")
    path.rename(path.with_suffix(".damaged"))
    StateDatabase(path).close()


def test_damage_while_it_is_open_is_reported_without_a_path(database, path):
    for i in range(100):
        database.save(random_adapter(random.Random(i), f"a{i}"))
    database = reopen(database, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    database._connection.execute("PRAGMA shrink_memory")  # forget the pages that opening has read
    with pytest.raises(AdapterStateError, match=r"^state\.sqlite is damaged") as caught:
        database.load()
    assert str(path) not in caught.value.message
    database.close()


def test_a_file_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "state.sqlite").mkdir()
    with pytest.raises(AdapterStateError, match="cannot be opened: the file cannot be opened"):
        StateDatabase(tmp_path / "state.sqlite")


def test_another_program_that_writes_is_named_as_the_cause(database, path):
    database._connection.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AdapterStateError, match="another program keeps the file locked"):
        database.save(ADAPTER)
    other.close()
    database.save(ADAPTER)


names = st.sampled_from(["a", "b", "c", "Ü-не-ascii"])
digests = st.sampled_from(["", "00" * 32, "ff" * 32])
adapters = st.builds(
    SavedAdapter,
    adapter_id=names,
    digest=digests,
    source=st.text(max_size=20),
    by_call=st.booleans(),
    folder_digest=digests,
    previous=digests,
    pinned=st.sampled_from(["", "host", "device"]),
    allow_zero=st.booleans(),
    allow_other_base=st.booleans(),
)
weights = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
target_lists = st.lists(st.builds(AliasTarget, names, digests, weights), min_size=1, max_size=4)


class DatabaseMachine(RuleBasedStateMachine):
    """Against dicts; closing and opening again is a step like any other."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "state.sqlite"
        self.database = StateDatabase(self.path)
        self.model = Model()

    def change(self, kind, argument):
        getattr(self.database, kind)(argument)
        self.model.apply(kind, argument)

    @rule(adapter=adapters)
    def save(self, adapter):
        self.change("save", adapter)

    @rule(name=names)
    def delete(self, name):
        self.change("delete", name)

    @rule(name=names, goes_to=target_lists)
    def save_alias(self, name, goes_to):
        self.change("save_alias", SavedAlias(name, tuple(goes_to)))

    @rule(name=names)
    def delete_alias(self, name):
        self.change("delete_alias", name)

    @rule()
    def restart(self):
        self.database = reopen(self.database, self.path)

    @rule(name=names)
    def get(self, name):
        assert self.database.get(name) == self.model.adapters.get(name)

    @invariant()
    def holds_what_the_model_holds(self):
        assert self.database.load() == self.model.state()

    def teardown(self):
        self.database.close()
        self.folder.cleanup()


TestDatabaseMachine = DatabaseMachine.TestCase
TestDatabaseMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
