"""Records <-> SQL: SQLite in a file (WAL) by default, PostgreSQL by URL. Knows tables, not meanings.

Trials are append-only: the database itself refuses to change or delete one. A trial is committed the moment it is
added, with its raw samples as compressed blobs, so that a kill loses at most the trial in flight. Everything derived
(measurements, rankings) is computed again from here. The schema has a version; older files are migrated when opened.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from edgejoule.errors import OutputError, StoreError
from edgejoule.plain import decode, encode, pack_floats, unpack_floats
from edgejoule.records import Artifact, Failure, Floats, Screened, Trial

SCHEMA_VERSION = 1
NAME = "results.sqlite"
_tables = sql.MetaData()
_meta = sql.Table("meta", _tables, sql.Column("key", sql.String, primary_key=True), sql.Column("value", sql.String, nullable=False))
_runs = sql.Table(
    "runs",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("study", sql.String, nullable=False),
    sql.Column("text", sql.Text, nullable=False),
    sql.Column("command", sql.Text, nullable=False),
    sql.Column("version", sql.String, nullable=False),
)
_screened = sql.Table(
    "screened",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("name", sql.String, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
_artifacts = sql.Table(
    "artifacts",
    _tables,
    sql.Column("sha256", sql.String, primary_key=True),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("label", sql.String, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
_trials = sql.Table(
    "trials",
    _tables,
    sql.Column("key", sql.String, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("artifact", sql.String, sql.ForeignKey("artifacts.sha256"), nullable=False),
    sql.Column("repeat", sql.Integer, nullable=False),
    sql.Column("started_at", sql.Float, nullable=False),
    sql.Column("record", sql.Text, nullable=False),  # without its samples
    sql.Column("latencies", sql.LargeBinary, nullable=False),
)
_traces = sql.Table(
    "traces",
    _tables,
    sql.Column("trial", sql.String, sql.ForeignKey("trials.key"), primary_key=True),
    sql.Column("position", sql.Integer, primary_key=True),
    sql.Column("record", sql.Text, nullable=False),  # without its samples
    sql.Column("times", sql.LargeBinary, nullable=False),
    sql.Column("samples", sql.LargeBinary, nullable=False),
)
_failures = sql.Table(
    "failures",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
_APPEND_ONLY = ("trials", "traces")

R = TypeVar("R")
Migration = Callable[[sql.Connection], None]
MIGRATIONS: dict[int, Migration] = {}  # from version n to n + 1


@dataclass(frozen=True, slots=True)
class Run:
    """One call of ``edgejoule run``: what was asked, when, by which version."""

    id: int
    created_at: float
    study: str
    text: str
    command: str
    version: str


class Store:
    """An open results file. Use as a context manager, or call ``close``."""

    def __init__(self, engine: sql.Engine, where: str) -> None:
        self._engine = engine
        self.where = where

    @classmethod
    def open(cls, where: str | Path, create: bool = True) -> Store:
        """A path to a SQLite file, or an SQLAlchemy URL (``postgresql+psycopg://…``).

        Raises StoreError for a file that is not ours or is newer than this program, OutputError where it cannot be written.
        """
        try:
            url = sql.make_url(str(where)) if "://" in str(where) else _sqlite_url(Path(where), create)
            engine = sql.create_engine(url)
        except (SQLAlchemyError, ImportError) as error:
            raise StoreError(f"cannot use {_shown(where)} as a store: {error}; expected a file path or a database URL") from error
        if engine.dialect.name == "sqlite":
            sql.event.listen(engine, "connect", _configure_sqlite if create else _configure_reading)
            sql.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        store = cls(engine, _shown(where))
        try:
            with store._transaction() as connection:
                _prepare(connection, store.where, create)
        except BaseException:
            engine.dispose()
            raise
        return store

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ writing

    def begin_run(self, study: str, text: str, command: str, version: str) -> int:
        """Records that a run begins; its number ties the rows below to it."""
        values = {"created_at": time.time(), "study": study, "text": text, "command": command, "version": version}
        with self._transaction() as connection:
            key = connection.execute(_runs.insert().values(values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def add_screened(self, run: int, rows: Iterable[Screened]) -> None:
        values = [{"run": run, "name": row.name, "record": _dump(row)} for row in rows]
        if values:
            with self._transaction() as connection:
                connection.execute(_screened.insert(), values)

    def add_artifact(self, artifact: Artifact) -> None:
        """Keeps the manifest (not the files). The same artifact twice is one row."""
        with self._transaction() as connection:
            if connection.execute(sql.select(_artifacts.c.sha256).where(_artifacts.c.sha256 == artifact.sha256)).first():
                return
            record = {**encode(artifact), "folder": ""}
            values = {"sha256": artifact.sha256, "created_at": time.time(), "label": artifact.label, "record": json.dumps(record)}
            connection.execute(_artifacts.insert().values(values))

    def add_trial(self, run: int, trial: Trial) -> None:
        """Commits a trial and its traces at once. Raises StoreError where its key is already there."""
        record = encode(trial) | {"latencies_s": None, "traces": []}
        row = {
            "key": trial.key,
            "run": run,
            "artifact": trial.artifact_sha256,
            "repeat": trial.repeat,
            "started_at": trial.started_at,
            "record": json.dumps(record),
            "latencies": pack_floats(trial.latencies_s),
        }
        traces = [
            {
                "trial": trial.key,
                "position": position,
                "record": json.dumps(encode(trace) | {"times_s": None, "values": None}),
                "times": pack_floats(trace.times_s),
                "samples": pack_floats(trace.values),
            }
            for position, trace in enumerate(trial.traces)
        ]
        with self._transaction() as connection:
            connection.execute(_trials.insert().values(row))
            if traces:
                connection.execute(_traces.insert(), traces)

    def add_failure(self, run: int, failure: Failure) -> None:
        with self._transaction() as connection:
            connection.execute(_failures.insert().values(run=run, record=_dump(failure)))

    # ------------------------------------------------------------ reading

    def runs(self) -> tuple[Run, ...]:
        """Every run, oldest first."""
        with self._transaction() as connection:
            return tuple(Run(*row) for row in connection.execute(sql.select(_runs).order_by(_runs.c.id)))

    def screened(self) -> tuple[Screened, ...]:
        """The newest row of every screened name, in the order of the newest run that screened anything."""
        with self._transaction() as connection:
            rows = connection.execute(sql.select(_screened.c.name, _screened.c.record).order_by(_screened.c.run.desc(), _screened.c.id))
            newest: dict[str, str] = {}
            for name, record in rows:
                newest.setdefault(name, record)
        return tuple(_load(Screened, record) for record in newest.values())

    def artifacts(self) -> Mapping[str, Artifact]:
        """Every artifact by its sha256, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(sql.select(_artifacts.c.sha256, _artifacts.c.record).order_by(_artifacts.c.created_at)).all()
        return {sha256: _load(Artifact, record) for sha256, record in rows}

    def trial_keys(self) -> frozenset[str]:
        with self._transaction() as connection:
            return frozenset(connection.execute(sql.select(_trials.c.key)).scalars())

    def trials(self, keys: Sequence[str] | None = None) -> Iterator[Trial]:
        """Trials with their samples, oldest first, a few at a time: all of them, or those of the given keys."""
        wanted = None if keys is None else set(keys)
        with self._transaction() as connection:
            order = list(connection.execute(sql.select(_trials.c.key).order_by(_trials.c.started_at)).scalars())
        for key in order:
            if wanted is None or key in wanted:
                yield self._trial(key)

    def failures(self, run: int | None = None) -> tuple[Failure, ...]:
        """The failures of one run, or of the newest."""
        newest = sql.select(sql.func.max(_runs.c.id)).scalar_subquery()
        with self._transaction() as connection:
            of_run = _failures.c.run == (newest if run is None else run)
            rows = connection.execute(sql.select(_failures.c.record).where(of_run).order_by(_failures.c.id)).scalars().all()
        return tuple(_load(Failure, record) for record in rows)

    def _trial(self, key: str) -> Trial:
        with self._transaction() as connection:
            row = connection.execute(sql.select(_trials.c.record, _trials.c.latencies).where(_trials.c.key == key)).one()
            traces = connection.execute(sql.select(_traces).where(_traces.c.trial == key).order_by(_traces.c.position)).all()
        record = _parsed(row.record, "Trial") | {"latencies_s": encode(_samples(row.latencies, key))}
        record["traces"] = [
            _parsed(trace.record, "Trace") | {"times_s": encode(_samples(trace.times, key)), "values": encode(_samples(trace.samples, key))}
            for trace in traces
        ]
        return _decoded(Trial, record)

    @contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, UnicodeDecodeError) as error:  # a damaged file may hold text that is none
            raise _explained(error, self.where) from error


def _sqlite_url(path: Path, create: bool) -> sql.URL:
    """A file that may not be written is opened as it lies, without the locks and side files of a living one."""
    try:
        if not create and not path.is_file():
            raise StoreError(f"there is no results file at {path}: expected the {NAME} that edgejoule run writes")
        path.parent.mkdir(parents=True, exist_ok=True)
        frozen = not create and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))
        pending = path.with_name(path.name + "-wal")
        if frozen and pending.exists() and pending.stat().st_size:
            raise StoreError(
                f"{path} may not be written, and its newest trials lie in {pending.name}: read copies of both in a folder of yours"
            )
    except OSError as error:
        raise OutputError(f"cannot use {path} ({error.strerror}): choose another folder with --out") from error
    if frozen:
        return sql.URL.create("sqlite", database=f"file:{quote(str(path.resolve()))}", query={"immutable": "1", "uri": "true"})
    return sql.URL.create("sqlite", database=str(path))


def _shown(where: str | Path) -> str:
    """A path or URL as it may be printed: without its password."""
    try:
        return sql.make_url(str(where)).render_as_string(hide_password=True) if "://" in str(where) else str(where)
    except SQLAlchemyError:
        return "the database URL"


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # our own BEGIN, so that making and migrating tables is one transaction too
    for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_reading(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout=10000")  # and no other: a file that is not ours stays as it is


def _prepare(connection: sql.Connection, where: str, create: bool) -> None:
    """Makes the tables of a new store, migrates an old one, refuses a newer one, and an empty one that is only to be read."""
    existing = sql.inspect(connection).get_table_names()
    if "meta" not in existing:
        if not existing and not create:
            raise StoreError(f"{where} is empty: expected the {NAME} that edgejoule run writes")
        if existing:
            raise StoreError(f"{where} is a database of another program ({', '.join(existing[:3])}): choose another --out")
        _tables.create_all(connection)
        for table in _APPEND_ONLY:
            _refuse_changes(connection, table)
        connection.execute(_meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))
        return
    found = connection.execute(sql.select(_meta.c.value).where(_meta.c.key == "schema_version")).scalar()
    version = int(found) if found and found.isdigit() else 0
    if version > SCHEMA_VERSION:
        raise StoreError(f"{where} has schema version {version}, this edgejoule knows up to {SCHEMA_VERSION}: upgrade edgejoule")
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise StoreError(
                f"{where} has schema version {version}, and there is no way from it to {SCHEMA_VERSION}: run the study into a new folder"
            )
        MIGRATIONS[version](connection)
        version += 1
        connection.execute(_meta.update().where(_meta.c.key == "schema_version").values(value=str(version)))


def _refuse_changes(connection: sql.Connection, table: str) -> None:
    message = f"{table} are append-only"
    if connection.dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            body = f"SELECT RAISE(ABORT, '{message}')"
            connection.execute(sql.text(f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} BEGIN {body}; END"))
    elif connection.dialect.name == "postgresql":
        body = f"BEGIN RAISE EXCEPTION '{message}'; END"
        connection.execute(sql.text(f"CREATE OR REPLACE FUNCTION {table}_append_only() RETURNS trigger AS $$ {body} $$ LANGUAGE plpgsql"))
        trigger = f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}"
        connection.execute(sql.text(f"{trigger} FOR EACH ROW EXECUTE FUNCTION {table}_append_only()"))


def _explained(error: Exception, where: str) -> StoreError | OutputError:
    said = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
    text = said.lower()
    if "full" in text or "i/o error" in text:
        return OutputError(f"no space is left for {where}, or its disk fails ({said}): free some and run again; what was stored is safe")
    if "readonly" in text or "read-only" in text or "unable to open" in text:
        return OutputError(f"cannot write {where} ({said}): choose a folder that you may write with --out")
    if "locked" in text or (isinstance(error, IntegrityError) and "unique" in text):
        return StoreError(f"{where} is in use by another run: wait for it, or choose another --out")
    if isinstance(error, OperationalError) and "utf-8" not in text:
        return StoreError(f"cannot use {where}: {said}; is the database there, and may you use it?")
    return StoreError(f"{where} is not a results file, is damaged, or refuses the change ({said}): expected one that edgejoule run wrote")


def _dump(record: Any) -> str:
    return json.dumps(encode(record))


def _load(cls: type[R], text: str) -> R:
    return _decoded(cls, _parsed(text, cls.__name__))


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise StoreError(f"a stored {name} is damaged ({error}): run the study into a new folder, or use a copy of the file") from error


def _decoded(cls: type[R], value: Any) -> R:
    try:
        return decode(cls, value)
    except ValueError as error:
        raise StoreError(f"a stored {cls.__name__} cannot be read ({error}): was it written by another version?") from error


def _samples(blob: bytes, key: str) -> Floats:
    try:
        return unpack_floats(blob)
    except ValueError as error:
        raise StoreError(f"the samples of trial {key[:12]} are damaged ({error}): measure it again into a new folder") from error
