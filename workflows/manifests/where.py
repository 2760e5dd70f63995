"""The SQL condition of `--where`, which chooses rows of a manifest."""

import itertools

import numpy as np
import pyarrow as pa

from wallaroo.workflows.settings import OptionError


class Filter:
    """Rows of a manifest for which an SQL expression over its columns holds, by DuckDB.

    The expression sees the rows alone: no file, network, environment or extension.
    """

    def __init__(self, expression: str, schema: pa.Schema):
        """Raises InputError, with DuckDB's own words, if the expression does not fit the columns."""
        import duckdb

        self.expression, self.error = expression, duckdb.Error
        # A name of our own for the row number; a manifest cannot be relied on not to use any one name.
        names = {name.lower() for name in schema.names}
        self.number = next(name for name in map("row_{}".format, itertools.count()) if name not in names)
        self.database = duckdb.connect(
            config={
                "enable_external_access": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
                "lock_configuration": True,
                "threads": 1,
            }
        )
        self.matches(schema.empty_table())

    def matches(self, table: pa.Table) -> np.ndarray:
        """bool [rows]: for which rows the expression is true. Raises InputError as above."""
        numbers = np.arange(table.num_rows)
        self.database.register("manifest", table.append_column(self.number, pa.array(numbers)))
        query = f"SELECT {self.number} FROM manifest WHERE (\n{self.expression}\n)"
        try:
            if len(self.database.extract_statements(query)) != 1:
                raise self.error("it is more than one expression")
            chosen = self.database.execute(query).fetchnumpy()[self.number]
        except self.error as error:
            words = str(error).strip().split("\n", 1)[0]
            raise OptionError(
                f"where is '{self.expression}', which DuckDB refuses ({words}): correct it."
            ) from None
        mask = np.zeros(table.num_rows, dtype=bool)
        mask[chosen] = True
        return mask
