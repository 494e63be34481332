"""The store: what is written comes back, trials never change, broken and foreign files are refused in one sentence."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy

from edgejoule import schema
from edgejoule.errors import OutputError, StoreError
from edgejoule.records import Epoch, Failure, Screened
from edgejoule.store import Store
from tests.samples import artifact, trial


def test_everything_comes_back(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.sqlite") as store:
        run = store.begin_run("s", "text", "edgejoule run", "0")
        row = Screened("m", 80.0, 5.0, 1.0, 60.0, True, "")
        store.add_screened(run, [row])
        store.add_artifact(artifact())
        store.add_artifact(artifact())
        store.add_trial(run, trial("k0"))
        store.add_failure(run, Failure("m", "onnxruntime", "compile", "why"))
    with Store.open(tmp_path / "r.sqlite", create=False) as store:
        assert store.screened() == (row,)
        assert list(store.artifacts().values()) == [artifact()]
        assert list(store.trials()) == [trial("k0")]
        assert store.trial_keys() == {"k0"}
        assert store.failures() == (Failure("m", "onnxruntime", "compile", "why"),)
        assert store.runs()[0].study == "s"


def test_trials_are_append_only(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.sqlite") as store:
        run = store.begin_run("s", "", "", "0")
        store.add_artifact(artifact())
        store.add_trial(run, trial("k0"))
        with pytest.raises(StoreError, match="in use by another run"):  # that is how the same key comes twice
            store.add_trial(run, trial("k0"))
    connection = sqlite3.connect(tmp_path / "r.sqlite")
    for change in ("UPDATE trials SET repeat = 9", "DELETE FROM trials", "DELETE FROM traces"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(change)


def test_sqlite_uses_wal(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.sqlite"):
        assert sqlite3.connect(tmp_path / "r.sqlite").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_old_schema_is_migrated_and_a_newer_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.sqlite"
    Store.open(path).close()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    with pytest.raises(StoreError, match="no way from it"):
        Store.open(path)
    monkeypatch.setitem(schema.MIGRATIONS, 2, lambda c: c.exec_driver_sql("ALTER TABLE runs ADD COLUMN note TEXT") and None)
    Store.open(path).close()
    columns = [row[1] for row in sqlite3.connect(path).execute("PRAGMA table_info(runs)")]
    assert "note" in columns
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    with pytest.raises(StoreError, match="upgrade edgejoule"):
        Store.open(path)


def from_before_training(path: Path) -> Path:
    """A results file of schema version 1."""
    Store.open(path).close()
    database = sqlite3.connect(path)
    for table in ("trainings", "epochs", "evaluations"):
        database.execute(f"DROP TABLE {table}")
    database.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")
    database.commit()
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


def test_a_file_from_before_training_is_brought_up_to_date(tmp_path: Path) -> None:
    path = from_before_training(tmp_path / "r.sqlite")
    with Store.open(path) as store:
        store.add_epoch("key", Epoch(1, 10, 0.5, 1e-3, 2.0, 640))
        store.add_epoch("key", Epoch(1, 10, 9.9, 1e-3, 2.0, 640))
        assert [epoch.loss for epoch in store.epochs("key")] == [0.5]
        assert store.trainings() == {} and store.evaluations() == ()


def test_an_older_file_that_is_only_read_stays_as_it_is(tmp_path: Path) -> None:
    path = from_before_training(tmp_path / "r.sqlite")
    before = path.read_bytes()
    with Store.open(path, create=False) as store:
        assert store.trainings() == {} and store.evaluations() == () and store.epochs("key") == () and store.failures() == ()
    assert path.read_bytes() == before


def test_a_run_that_screens_twice_knows_more_the_second_time(tmp_path: Path) -> None:
    rows = [Screened(name, 80.0, 1.0, 1.0, score, name != "c", "") for name, score in (("a", 70.0), ("b", 60.0), ("c", 50.0))]
    with Store.open(tmp_path / "r.sqlite") as store:
        run = store.begin_run("x", "", "", "")
        store.add_screened(run, rows)
        store.add_screened(run, [replace(rows[1], netscore=99.0), replace(rows[0], netscore=98.0)])
        assert [(row.name, row.netscore) for row in store.screened()] == [("b", 99.0), ("a", 98.0), ("c", 50.0)]


def test_a_failed_migration_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.sqlite"
    Store.open(path).close()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    monkeypatch.setitem(schema.MIGRATIONS, 2, _half_a_migration)
    with pytest.raises(StoreError):
        Store.open(path)
    database = sqlite3.connect(path)
    assert database.execute("SELECT value FROM meta").fetchone() == ("2",)
    assert "note" not in [row[1] for row in database.execute("PRAGMA table_info(runs)")]


def _half_a_migration(connection: object) -> None:
    connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN note TEXT")  # type: ignore[attr-defined]
    connection.exec_driver_sql("ALTER TABLE nothing ADD COLUMN note TEXT")  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", [b"hello, I am no database", b"SQLite format 3\x00" + b"\xff" * 200])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    with pytest.raises(StoreError):
        Store.open(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customers (id)")
    connection.commit()
    with pytest.raises(StoreError, match="another program"):
        Store.open(path)


def test_a_missing_store_is_said_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no results file"):
        Store.open(tmp_path / "none.sqlite", create=False)
    assert not list(tmp_path.iterdir())


def test_reading_changes_no_file(tmp_path: Path) -> None:
    empty, foreign = tmp_path / "table.csv", tmp_path / "customers.sqlite"
    empty.touch()
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE customers (id)")
    connection.commit()
    connection.close()
    before = foreign.read_bytes()
    with pytest.raises(StoreError, match="is empty"):
        Store.open(empty, create=False)
    with pytest.raises(StoreError, match="another program"):
        Store.open(foreign, create=False)
    assert empty.read_bytes() == b"" and foreign.read_bytes() == before


@pytest.mark.parametrize("name", ["what?mode=ro", "100%20 #1", "file:x"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    Store.open(tmp_path / name / "r.sqlite").close()
    assert (tmp_path / name / "r.sqlite").is_file()
    Store.open(tmp_path / name / "r.sqlite", create=False).close()


def test_damaged_rows_are_one_sentence(tmp_path: Path) -> None:
    for damage in ("record = substr(record, 1, 100)", "record = '[1]'", "record = CAST(x'ff00ff' AS TEXT)"):
        path = tmp_path / f"{abs(hash(damage))}.sqlite"
        with Store.open(path) as store:
            store.begin_run("s", "", "", "0")
            store.add_artifact(artifact())
        connection = sqlite3.connect(path)
        connection.execute(f"UPDATE artifacts SET {damage}")
        connection.commit()
        connection.close()
        with Store.open(path, create=False) as store, pytest.raises(StoreError, match="damaged"):
            store.artifacts()


def test_a_password_is_not_printed() -> None:
    with pytest.raises(StoreError) as caught:
        Store.open("postgresql+psycopg://somebody:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value) and "somebody" in str(caught.value)


def test_what_a_killed_run_left_is_not_overlooked_in_a_folder_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.sqlite"
    script = "import os, sys; from edgejoule.store import Store; Store.open(sys.argv[1]).begin_run('s', '', '', '0'); os._exit(1)"
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert (tmp_path / "r.sqlite-wal").stat().st_size
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match=r"newest trials lie in r\.sqlite-wal"):
        Store.open(path, create=False)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="--out"):
        Store.open(tmp_path / "file" / "sub" / "r.sqlite")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a small file system limit, which this system lacks")
def test_a_full_disk_is_one_sentence_and_keeps_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Store.open(path) as store:
        run = store.begin_run("s", "", "", "0")
        store.add_artifact(artifact())
        store.add_trial(run, trial("k0"))
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from edgejoule.store import Store; from edgejoule.errors import EdgejouleError; from tests.samples import trial\n"
        "store = Store.open(sys.argv[1])\n"
        "try:\n"
        "    for i in range(1, 500): store.add_trial(1, trial(f'k{i}', samples=5000))\n"
        "except EdgejouleError as error: print(type(error).__name__)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.strip() in {"OutputError", "StoreError"}, done.stderr
    with Store.open(path) as store:
        assert trial("k0") in list(store.trials(["k0"]))


def test_a_killed_writer_leaves_whole_trials_only(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    script = (
        "import sys; from edgejoule.store import Store; from tests.samples import artifact, trial\n"
        "store = Store.open(sys.argv[1]); run = store.begin_run('s', '', '', '0'); store.add_artifact(artifact())\n"
        "for i in range(10**6):\n"
        "    store.add_trial(run, trial(f'k{i}', samples=2000)); print(i, flush=True)\n"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Store.open(path) as store:
        keys = store.trial_keys()
        assert {f"k{line.strip()}" for line in said} <= keys
        assert all(len(t.latencies_s) == 2000 and len(t.traces) == 1 for t in store.trials())


def test_postgresql_holds_the_same(postgres_url: str) -> None:
    with Store.open(postgres_url) as store:
        run = store.begin_run("s", "text", "edgejoule run", "0")
        store.add_artifact(artifact())
        store.add_trial(run, trial("k0"))
        assert list(store.trials()) == [trial("k0")]
        with pytest.raises(StoreError):
            store.add_trial(run, trial("k0"))
    with Store.open(postgres_url) as store:
        assert store.trial_keys() == {"k0"}
    engine = sqlalchemy.create_engine(postgres_url)
    with pytest.raises(sqlalchemy.exc.DatabaseError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM traces")
    engine.dispose()


def test_a_database_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(StoreError, match="is the database there"):
        Store.open("postgresql+psycopg://nobody@127.0.0.1:1/none")


def test_the_same_files_are_one_artifact_as_judged_last(tmp_path: Path) -> None:
    from dataclasses import replace

    from edgejoule.caveats import caveat
    from tests.samples import artifact

    judged = replace(artifact(), notes={"budget_pct": "50"}, caveats=(caveat("parity_low", "0.6"),))
    written = replace(judged, parity=None, caveats=(caveat("not_run", "no Mac"),))
    again = replace(judged, notes={"budget_pct": "1"}, caveats=())
    with Store.open(tmp_path / "results.sqlite") as store:
        for one, budget, codes in (
            (written, "50", ["not_run"]),
            (judged, "50", ["parity_low"]),
            (again, "1", []),
            (written, "1", []),  # what was only written again is still what it was judged to be
        ):
            store.add_artifact(one)
            (kept,) = store.artifacts().values()
            assert kept.notes["budget_pct"] == budget and [doubt.code for doubt in kept.caveats] == codes
            assert kept.folder == "" and kept.variant == judged.variant
