"""The tables of a results file: their columns, their version, and how an older file is brought up to date. Knows no record.

Trials and traces are append-only: the database itself refuses to change or delete one.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sql

from edgejoule.errors import StoreError

SCHEMA_VERSION = 2
tables = sql.MetaData()
meta = sql.Table("meta", tables, sql.Column("key", sql.String, primary_key=True), sql.Column("value", sql.String, nullable=False))
runs = sql.Table(
    "runs",
    tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("study", sql.String, nullable=False),
    sql.Column("text", sql.Text, nullable=False),
    sql.Column("command", sql.Text, nullable=False),
    sql.Column("version", sql.String, nullable=False),
)
screened = sql.Table(
    "screened",
    tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("name", sql.String, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
artifacts = sql.Table(
    "artifacts",
    tables,
    sql.Column("sha256", sql.String, primary_key=True),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("label", sql.String, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
trials = sql.Table(
    "trials",
    tables,
    sql.Column("key", sql.String, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("artifact", sql.String, sql.ForeignKey("artifacts.sha256"), nullable=False),
    sql.Column("repeat", sql.Integer, nullable=False),
    sql.Column("started_at", sql.Float, nullable=False),
    sql.Column("record", sql.Text, nullable=False),  # without its samples
    sql.Column("latencies", sql.LargeBinary, nullable=False),
)
traces = sql.Table(
    "traces",
    tables,
    sql.Column("trial", sql.String, sql.ForeignKey("trials.key"), primary_key=True),
    sql.Column("position", sql.Integer, primary_key=True),
    sql.Column("record", sql.Text, nullable=False),  # without its samples
    sql.Column("times", sql.LargeBinary, nullable=False),
    sql.Column("samples", sql.LargeBinary, nullable=False),
)
failures = sql.Table(
    "failures",
    tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
trainings = sql.Table(
    "trainings",
    tables,
    sql.Column("key", sql.String, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
epochs = sql.Table(
    "epochs",
    tables,
    sql.Column("training", sql.String, primary_key=True),  # the key of a training that may not have ended yet
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("record", sql.Text, nullable=False),
)
evaluations = sql.Table(
    "evaluations",
    tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("run", sql.Integer, sql.ForeignKey("runs.id"), nullable=False),
    sql.Column("artifact", sql.String, sql.ForeignKey("artifacts.sha256"), nullable=False),
    sql.Column("record", sql.Text, nullable=False),
)
_APPEND_ONLY = ("trials", "traces")

Migration = Callable[[sql.Connection], None]


def _add_training(connection: sql.Connection) -> None:
    for table in (trainings, epochs, evaluations):
        table.create(connection)


MIGRATIONS: dict[int, Migration] = {1: _add_training}  # from version n to n + 1


def prepare(connection: sql.Connection, where: str, create: bool) -> frozenset[str]:
    """Makes the tables of a new store, migrates an old one, refuses a newer one, and an empty one that is only to be read.

    Returns the tables that an old one, which is only to be read and so stays as it is, does not have.
    """
    existing = sql.inspect(connection).get_table_names()
    if "meta" not in existing:
        if not existing and not create:
            raise StoreError(f"{where} is empty: expected the results.sqlite that edgejoule run writes")
        if existing:
            raise StoreError(f"{where} is a database of another program ({', '.join(existing[:3])}): choose another --out")
        tables.create_all(connection)
        for table in _APPEND_ONLY:
            _refuse_changes(connection, table)
        connection.execute(meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))
        return frozenset()
    found = connection.execute(sql.select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    version = int(found) if found and found.isdigit() else 0
    if version > SCHEMA_VERSION:
        raise StoreError(f"{where} has schema version {version}, this edgejoule knows up to {SCHEMA_VERSION}: upgrade edgejoule")
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise StoreError(
                f"{where} has schema version {version}, and there is no way from it to {SCHEMA_VERSION}: run the study into a new folder"
            )
        if not create:
            return frozenset(tables.tables) - set(existing)
        MIGRATIONS[version](connection)
        version += 1
        connection.execute(meta.update().where(meta.c.key == "schema_version").values(value=str(version)))
    return frozenset()


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
