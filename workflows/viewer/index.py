"""A local index of outputs: their small columns in DuckDB, one database file an output.

The index is a cache. Missing and stale shards are read again. A damaged file is replaced; a file that
another viewer has open is left alone, and this process builds a temporary one. SQL expressions of a user
run in a read-only transaction without access to files, with a time limit. Knows nothing of pages.
"""

import hashlib
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from wallaroo.model.errors import InputError
from wallaroo.workflows.manifests.where import exact_names, twins
from wallaroo.workflows.outputs.schema import RESULT_NAMES
from wallaroo.workflows.text import first_line
from wallaroo.workflows.viewer.shards import Shard, is_indexed

VERSION = 1
"""Version of the layout. It is part of the file name, so other versions are ignored."""

MEMORY = "160MB"
THREADS = 2
SECONDS = 10.0
"""Time limit of a query."""

KEPT_DAYS = 30
"""Indexes that were not opened for so long are deleted."""


_OURS = re.compile(r"[0-9a-f]{32}-\d+\.duckdb(\.wal)?")
"""Names of index files of any version."""


class QueryError(InputError):
    """The search, filter, order or place that a user asked for is invalid or too expensive."""


def cache_folder() -> Path:
    """Returns the folder of the index files."""
    return Path.home() / ".cache" / "wallaroo" / "view"


def quoted(name: str) -> str:
    """Returns a name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


class Index:
    """The index of all outputs of a viewer. Thread-safe.

    The database of output N is attached as `oN`. Its table `oN.rows` has the columns `shard` and `position`
    (of the row in the file of the shard) and those that `is_indexed`; `oN.shards` lists the indexed shards.

    Attributes:
        names: For each output: name of a column in the shards -> its name in `rows`.
        kinds: For each output: name of a column in `rows` -> its DuckDB type. Empty before the first shard.
        versions: For each output: number of changes to its rows.
    """

    def __init__(self, outputs: Sequence[str]) -> None:
        """Opens or creates the index files.

        Args:
            outputs: Paths of the outputs, as `shards.whole_path` returns them, each once.
        """
        self._private = Path(tempfile.mkdtemp(prefix="wallaroo-view-"))
        self._writing = threading.Lock()
        self._at_once = threading.BoundedSemaphore(2)
        self.names: list[dict[str, str]] = [{} for _ in outputs]
        self.kinds: list[dict[str, str]] = [{} for _ in outputs]
        self.versions = [0 for _ in outputs]
        self._database = duckdb.connect(
            ":memory:",
            config={
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
                "memory_limit": MEMORY,
                "threads": THREADS,
                "preserve_insertion_order": False,
                "temp_directory": str(self._private / "spill"),
            },
        )
        for number, output in enumerate(outputs):
            self._attach(number, output)
        # From here on no statement can open a file or take these two back.
        self._database.execute("SET enable_external_access = false")
        self._database.execute("SET lock_configuration = true")

    def close(self) -> None:
        """Closes the database and removes temporary files."""
        with suppress(duckdb.Error):
            self._database.close()
        shutil.rmtree(self._private, ignore_errors=True)

    def _attach(self, number: int, output: str) -> None:
        folder = cache_folder()
        name = hashlib.sha256(output.encode(errors="surrogateescape")).hexdigest()
        path = folder / f"{name[:32]}-{VERSION}.duckdb"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _forget_old(folder)
            for _ in range(2):
                try:
                    self._open(number, path)
                    os.utime(path)
                    return
                except duckdb.Error as error:
                    if "lock" in str(error).lower():
                        break  # another viewer fills it
                    path.unlink(missing_ok=True)
                    Path(f"{path}.wal").unlink(missing_ok=True)
        except OSError:
            pass  # if the home folder cannot be written, the index is temporary
        self._open(number, self._private / f"{number}.duckdb")

    def _open(self, number: int, path: Path) -> None:
        where = str(path).replace("'", "''")
        self._database.execute(f"ATTACH '{where}' AS o{number}")
        try:
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS o{number}.shards (number BIGINT, etag VARCHAR, count BIGINT)"
            )
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS o{number}.columns (source VARCHAR, name VARCHAR, kind VARCHAR)"
            )
            self._learn(number)
        except duckdb.Error:
            self._database.execute(f"DETACH o{number}")
            raise

    def _learn(self, number: int) -> None:
        found = self._database.execute(f"SELECT source, name FROM o{number}.columns").fetchall()
        self.names[number] = dict(found)
        if found:
            described = self._database.execute(f"DESCRIBE o{number}.rows").fetchall()
            self.kinds[number] = {row[0]: row[1] for row in described}

    # Filling it

    def known(self, number: int) -> dict[int, str]:
        """Returns the indexed shards of an output: number -> etag."""
        cursor = self._database.cursor()
        return dict(cursor.execute(f"SELECT number, etag FROM o{number}.shards").fetchall())

    def count(self, number: int) -> int:
        """Returns the number of indexed rows of an output."""
        cursor = self._database.cursor()
        found = cursor.execute(f"SELECT coalesce(sum(count), 0)::BIGINT FROM o{number}.shards").fetchone()
        return found[0] if found else 0

    def remove(self, number: int, shards: Iterable[int]) -> None:
        """Removes shards from the index of an output.

        Args:
            number: Of the output.
            shards: Numbers of the shards.
        """
        wanted = [[shard] for shard in shards]
        if not wanted:
            return
        with self._writing:
            cursor = self._database.cursor()
            for table, column in (("rows", "shard"), ("shards", "number")):
                if table == "shards" or self.names[number]:
                    cursor.executemany(f"DELETE FROM o{number}.{table} WHERE {column} = ?", wanted)
            self.versions[number] += 1

    def add(self, number: int, found: Sequence[tuple[Shard, pa.Table]]) -> None:
        """Adds shards to the index of an output; replaces those of the same number.

        Args:
            number: Of the output.
            found: Shards, each with its table from `Reader.small`.

        Raises:
            InputError: If a shard has other columns than the indexed ones.
        """
        with self._writing:
            cursor = self._database.cursor()
            for shard, table in found:
                schema = _plain(table.schema)
                if not self.names[number]:
                    self._create(cursor, number, schema)
                if set(schema.names) != set(self.names[number]):
                    raise InputError(
                        f"{shard.path} has other columns than the shards before it: "
                        f"`wallaroo verify` checks the output."
                    )
                cursor.register("incoming", self._renamed(number, shard, table.cast(schema)))
                cursor.execute("BEGIN")
                try:
                    cursor.execute(f"DELETE FROM o{number}.rows WHERE shard = ?", [shard.number])
                    cursor.execute(f"DELETE FROM o{number}.shards WHERE number = ?", [shard.number])
                    cursor.execute(f"INSERT INTO o{number}.rows BY NAME SELECT * FROM incoming")
                    cursor.execute(
                        f"INSERT INTO o{number}.shards VALUES (?, ?, ?)",
                        [shard.number, shard.etag, table.num_rows],
                    )
                    cursor.execute("COMMIT")
                except duckdb.Error as error:
                    cursor.execute("ROLLBACK")
                    raise InputError(f"{shard.path} cannot be indexed ({first_line(error, 300)}).") from None
                finally:
                    cursor.unregister("incoming")
                self.versions[number] += 1

    def forget(self, number: int) -> None:
        """Empties the index of an output, so that it may get other columns."""
        with self._writing:
            cursor = self._database.cursor()
            cursor.execute(f"DROP TABLE IF EXISTS o{number}.rows")
            cursor.execute(f"DELETE FROM o{number}.shards")
            cursor.execute(f"DELETE FROM o{number}.columns")
            self.names[number], self.kinds[number] = {}, {}
            self.versions[number] += 1

    def _create(self, cursor: Any, number: int, schema: pa.Schema) -> None:
        taken = {"shard", "position"}
        names = {}
        for name in schema.names:
            if name == "shard":
                names[name] = name
                continue
            # DuckDB does not tell Tag from tag.
            tries = (name if count == 0 else f"{name}_{count}" for count in itertools.count())
            names[name] = next(one for one in tries if one.lower() not in taken)
            taken.add(names[name].lower())
        empty = schema.empty_table().rename_columns([names[name] for name in schema.names])
        empty = empty.append_column("position", pa.array([], pa.int32()))
        cursor.register("empty", empty)
        cursor.execute(f"CREATE OR REPLACE TABLE o{number}.rows AS SELECT * FROM empty")
        cursor.unregister("empty")
        cursor.executemany(f"INSERT INTO o{number}.columns VALUES (?, ?, '')", list(map(list, names.items())))
        self.names[number] = names
        described = cursor.execute(f"DESCRIBE o{number}.rows").fetchall()
        self.kinds[number] = {row[0]: row[1] for row in described}

    def _renamed(self, number: int, shard: Shard, table: pa.Table) -> pa.Table:
        names = self.names[number]
        table = table.rename_columns([names[name] for name in table.column_names])
        # The name of the file says which shard this is; a copied file may say another.
        place = table.schema.get_field_index("shard")
        table = table.set_column(place, "shard", pa.array(np.full(len(table), shard.number, np.int64)))
        return table.append_column("position", pa.array(np.arange(len(table), dtype=np.int32)))

    # Asking it

    def ask(
        self, sql: str, parameters: Sequence[Any] = (), tables: dict[str, pa.Table] | None = None
    ) -> pa.Table:
        """Runs a query in a read-only transaction.

        Args:
            sql: One SELECT statement.
            parameters: Values of its question marks.
            tables: Arrow tables that the statement may use, by name.

        Returns:
            The rows.

        Raises:
            QueryError: If DuckDB refuses the query, or it exceeds its time or memory.
        """
        with self._at_once:
            cursor = self._database.cursor()
            for name, table in (tables or {}).items():
                cursor.register(name, table)
            late = threading.Event()

            def stop() -> None:
                late.set()
                cursor.interrupt()

            timer = threading.Timer(SECONDS, stop)
            timer.daemon = True
            timer.start()
            started = time.monotonic()
            try:
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                return cursor.sql(sql, params=list(parameters)).to_arrow_table()
            except duckdb.OutOfMemoryException:
                raise QueryError("the query needs more memory than a page may use: narrow it.") from None
            except duckdb.Error as error:
                if late.is_set():
                    raise QueryError(
                        f"the query took more than {time.monotonic() - started:.0f} s: narrow it."
                    ) from None
                raise QueryError(f"DuckDB refuses it ({first_line(error, 300)}): correct it.") from None
            finally:
                timer.cancel()
                cursor.close()


def checked_expression(text: str, names: Mapping[str, str]) -> str:
    """Checks that a text is exactly one SQL expression, but not its columns.

    Args:
        text: A condition of the user.
        names: Name of a column -> its name in the index.

    Returns:
        The expression. Columns whose names differ only in case have their names in the index.

    Raises:
        QueryError: It is no expression, or a name may be any of several columns.
    """
    try:
        duckdb.SQLExpression(text)
        aliases = {name: names[name] for name in twins(list(names))}
        return exact_names(text, aliases, duckdb.connect()) if aliases else text
    except (duckdb.Error, ValueError) as error:
        raise QueryError(
            f"where is '{text}', which DuckDB refuses ({first_line(error, 300)}): correct it."
        ) from None


def _plain(schema: pa.Schema) -> pa.Schema:
    """Returns the indexed part of a schema, with dictionary columns as plain ones."""
    fields = []
    for field in schema:
        kind = field.type.value_type if pt.is_dictionary(field.type) else field.type
        if not is_indexed(field) and field.name not in RESULT_NAMES:
            continue
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def _forget_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 86400
    for path in folder.glob("*.duckdb*"):
        with suppress(OSError):
            if _OURS.fullmatch(path.name) and path.stat().st_mtime < oldest:
                path.unlink()
