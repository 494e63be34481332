"""Records <-> SQL: SQLite in a file (WAL) by default, PostgreSQL by URL. Knows tables, not meanings.

Trials are append-only: the database itself refuses to change or delete one. A trial is committed the moment it is
added, with its raw samples as compressed blobs, so that a kill loses at most the trial in flight. Everything derived
(measurements, rankings) is computed again from here. The schema has a version; older files are migrated when opened.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from edgejoule import schema
from edgejoule.errors import OutputError, StoreError
from edgejoule.plain import decode, encode, pack_floats, unpack_floats
from edgejoule.records import Artifact, Epoch, Evaluation, Failure, Floats, Screened, Training, Trial

NAME = "results.sqlite"

R = TypeVar("R")


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
        self._missing: frozenset[str] = frozenset()  # tables that an older file, opened to be read, does not have

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
                store._missing = schema.prepare(connection, store.where, create)
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
            key = connection.execute(schema.runs.insert().values(values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def add_screened(self, run: int, rows: Iterable[Screened]) -> None:
        values = [{"run": run, "name": row.name, "record": _dump(row)} for row in rows]
        if values:
            with self._transaction() as connection:
                connection.execute(schema.screened.insert(), values)

    def add_artifact(self, artifact: Artifact) -> None:
        """Keeps the manifest (not the files). The same files twice are one row: under their first name, as judged last.

        A file that was only written since is still what it was judged to be before.
        """
        table = schema.artifacts
        with self._transaction() as connection:
            row = connection.execute(sql.select(table.c.record).where(table.c.sha256 == artifact.sha256)).first()
            if row is not None:
                first = _load(Artifact, row.record)
                last = replace(artifact, variant=first.variant, backend=first.backend, folder="") if artifact.parity else first
                if last != first:
                    connection.execute(table.update().where(table.c.sha256 == artifact.sha256).values(record=_dump(last)))
                return
            values = {"sha256": artifact.sha256, "created_at": time.time(), "label": artifact.label}
            connection.execute(table.insert().values(values | {"record": _dump(replace(artifact, folder=""))}))

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
            connection.execute(schema.trials.insert().values(row))
            if traces:
                connection.execute(schema.traces.insert(), traces)

    def add_failure(self, run: int, failure: Failure) -> None:
        with self._transaction() as connection:
            connection.execute(schema.failures.insert().values(run=run, record=_dump(failure)))

    def add_epoch(self, training: str, epoch: Epoch) -> None:
        """Keeps an epoch of a training run by its key; one that is there already is left as it is (a run that resumed told it before)."""
        where = (schema.epochs.c.training == training) & (schema.epochs.c.number == epoch.number)
        with self._transaction() as connection:
            if not connection.execute(sql.select(schema.epochs.c.number).where(where)).first():
                connection.execute(schema.epochs.insert().values(training=training, number=epoch.number, record=_dump(epoch)))

    def add_training(self, run: int, training: Training) -> None:
        """Keeps a finished training run. Raises StoreError where its key is already there."""
        with self._transaction() as connection:
            values = {"key": training.key, "run": run, "created_at": time.time(), "record": _dump(training)}
            connection.execute(schema.trainings.insert().values(values))

    def add_evaluation(self, run: int, evaluation: Evaluation) -> None:
        with self._transaction() as connection:
            values = {"run": run, "artifact": evaluation.artifact_sha256, "record": _dump(evaluation)}
            connection.execute(schema.evaluations.insert().values(values))

    # ------------------------------------------------------------ reading

    def runs(self) -> tuple[Run, ...]:
        """Every run, oldest first."""
        with self._transaction() as connection:
            return tuple(Run(*row) for row in connection.execute(sql.select(schema.runs).order_by(schema.runs.c.id)))

    def screened(self) -> tuple[Screened, ...]:
        """The newest row of every screened name, in the order of the newest run that screened anything."""
        columns = schema.screened.c
        with self._transaction() as connection:
            rows = connection.execute(sql.select(columns.run, columns.name, columns.record).order_by(columns.run.desc(), columns.id)).all()
        newest: dict[str, tuple[int, str]] = {}
        for run, name, record in rows:
            if name not in newest or newest[name][0] == run:  # a run that trains screens twice, and knows more the second time
                newest.pop(name, None)
                newest[name] = run, record
        found = [_load(Screened, record) for _, record in newest.values()]
        return tuple(sorted(found, key=lambda row: not row.kept))  # the kept first, each part in its own order

    def artifacts(self) -> Mapping[str, Artifact]:
        """Every artifact by its sha256, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(
                sql.select(schema.artifacts.c.sha256, schema.artifacts.c.record).order_by(schema.artifacts.c.created_at)
            ).all()
        return {sha256: _load(Artifact, record) for sha256, record in rows}

    def trial_keys(self) -> frozenset[str]:
        with self._transaction() as connection:
            return frozenset(connection.execute(sql.select(schema.trials.c.key)).scalars())

    def trials(self, keys: Sequence[str] | None = None) -> Iterator[Trial]:
        """Trials with their samples, oldest first, a few at a time: all of them, or those of the given keys."""
        wanted = None if keys is None else set(keys)
        with self._transaction() as connection:
            order = list(connection.execute(sql.select(schema.trials.c.key).order_by(schema.trials.c.started_at)).scalars())
        for key in order:
            if wanted is None or key in wanted:
                yield self._trial(key)

    def trainings(self) -> Mapping[str, Training]:
        """Every finished training run by its key, oldest first."""
        if "trainings" in self._missing:
            return {}
        with self._transaction() as connection:
            rows = connection.execute(
                sql.select(schema.trainings.c.key, schema.trainings.c.record).order_by(schema.trainings.c.created_at)
            ).all()
        return {key: _load(Training, record) for key, record in rows}

    def epochs(self, training: str) -> tuple[Epoch, ...]:
        """The epochs of a training run, finished or not, in order."""
        if "epochs" in self._missing:
            return ()
        with self._transaction() as connection:
            chosen = sql.select(schema.epochs.c.record).where(schema.epochs.c.training == training).order_by(schema.epochs.c.number)
            rows = connection.execute(chosen).scalars().all()
        return tuple(_load(Epoch, record) for record in rows)

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Every evaluation of an artifact, oldest first."""
        if "evaluations" in self._missing:
            return ()
        with self._transaction() as connection:
            rows = connection.execute(sql.select(schema.evaluations.c.record).order_by(schema.evaluations.c.id)).scalars().all()
        return tuple(_load(Evaluation, record) for record in rows)

    def failures(self, run: int | None = None) -> tuple[Failure, ...]:
        """The failures of one run, or of the newest."""
        newest = sql.select(sql.func.max(schema.runs.c.id)).scalar_subquery()
        with self._transaction() as connection:
            of_run = schema.failures.c.run == (newest if run is None else run)
            rows = connection.execute(sql.select(schema.failures.c.record).where(of_run).order_by(schema.failures.c.id)).scalars().all()
        return tuple(_load(Failure, record) for record in rows)

    def _trial(self, key: str) -> Trial:
        with self._transaction() as connection:
            row = connection.execute(sql.select(schema.trials.c.record, schema.trials.c.latencies).where(schema.trials.c.key == key)).one()
            traces = connection.execute(
                sql.select(schema.traces).where(schema.traces.c.trial == key).order_by(schema.traces.c.position)
            ).all()
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
