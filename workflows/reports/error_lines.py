"""Error rows as lines of a manifest, to retry them."""

import json
from collections.abc import Mapping
from typing import IO, Any

import pyarrow as pa

from wallaroo.workflows.outputs.schema import RESULT_NAMES, json_columns, own_name
from wallaroo.workflows.outputs.values import json_again, json_line, jsonable
from wallaroo.workflows.plans.columns import GIVEN
from wallaroo.workflows.sources.embedded import Cell

_PARAMETERS = ("prompt", "language", "width", "height", "seed", "cfg", "temperature", "top_k", "top_p")


def error_row(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """What `errors.jsonl` must know of an error row, as values of JSON.

    Args:
        row: A row of `data/`.
        schema: Of its file.

    Returns:
        `row_id`, `version`, `sample`, and `line`, which `manifest_row` gives.
    """
    names = ("row_id", "version", "sample")
    return {name: row[name] for name in names} | {"line": manifest_row(row, schema)}


def manifest_row(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """An error row as a line of a manifest: id, kind, message, then the columns it came from.

    `image` is where the source picture is: `FILE#ROW` for one in a Parquet file, which a manifest accepts
    too. Carried columns get the names they had in the manifest, unless such a name is taken here. JSON text
    becomes JSON again; bytes become base64.

    Args:
        row: A row of `data/`.
        schema: Schema of its file.

    Returns:
        The line, as JSON values.
    """
    line: dict[str, Any] = {"id": row["id"], "kind": row["error_type"], "message": row["error_message"]}
    # A size follows from the source wherever there is one.
    unwanted = () if row["task"] == "generate" else ("width", "height")
    line |= {name: row[name] for name in _PARAMETERS if row[name] is not None and name not in unwanted}
    source = row["source"] or {}
    if source.get("uri"):
        inside = source.get("row_id") is not None
        line["image"] = str(Cell(source["uri"], source["row_id"])) if inside else source["uri"]
    marked = json_columns(schema)
    for name in schema.names:
        if name in RESULT_NAMES or name == GIVEN or row[name] is None:
            continue
        value = json_again(row[name]) if name in marked else jsonable(row[name])
        own = own_name(name)
        line.setdefault(own if own not in line else name, value)
    return line


def as_given(line: dict[str, Any], given: str | None) -> dict[str, Any]:
    """Puts the values of the manifest, right or wrong, in place of resolved ones.

    Args:
        line: A line of `manifest_row`.
        given: JSON text, which the plan holds as GIVEN for a row that it refused; None for other rows.

    Returns:
        The line; unchanged if `given` is None.
    """
    values = json.loads(given) if given else {}
    kept = {name: value for name, value in line.items() if name not in values}
    return kept | {name: value for name, value in values.items() if value is not None}


class ErrorLines:
    """Writes error rows as manifest rows: one line for all samples of an id where they failed alike.

    Args:
        file: The open file that the lines go to.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self._group: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a row that `error_row` gave; call it in the order of the rows.

        A row that the plan refused has GIVEN too, if the plan kept what its manifest said.
        """
        last = self._group[-1] if self._group else None
        if last is None or not (_follows(last, row) and _alike(last["line"], row["line"])):
            self.flush()
        self._group.append(row)

    def flush(self) -> None:
        """Writes the remaining line."""
        if not self._group:
            return
        group, self._group = self._group, []
        first = group[0]["line"]
        if group[0].get(GIVEN):
            # All samples of a refused row are refused alike.
            lines = [as_given(first, group[0][GIVEN])]
        elif group[0]["sample"] == 0:
            lines = [first | {"samples": len(group)}]
            seeds = [row["line"].get("seed") for row in group]
            steps = [(seed - seeds[0]) % 2**63 if None not in (seed, seeds[0]) else None for seed in seeds]
            if steps != list(range(len(group))):
                # The seeds came from id and sample number, and will again.
                lines[0].pop("seed", None)
        else:
            # Samples without the first of their id need names and seeds of their own.
            lines = [
                row["line"] | {"id": f"{row['line']['id']}/{row['sample']}", "samples": 1} for row in group
            ]
        for line in lines:
            self.file.write(json_line(line))


def _follows(last: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is the next sample of the same manifest row."""
    place = (row["line"]["id"], row["version"], row["row_id"], row["sample"])
    return place == (last["line"]["id"], last["version"], last["row_id"] + 1, last["sample"] + 1)


def _alike(last: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return (row["kind"], row["message"]) == (last["kind"], last["message"])
