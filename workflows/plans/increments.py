"""New rows of a growing manifest, found by their values and by the listing of their sources.

A row is a pair: its id, and a digest of its own columns and of the address, size and etag of its source. A
pair that no round has seen is a new row, the next version of its id. No source is downloaded for this. Each
round keeps its pairs beside the plan, as `plan/known-<digest>.parquet`. Knows nothing of Ray and of parts.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError, RowError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.types import Manifest, ManifestFile, decode_schema
from wallaroo.workflows.outputs.layout import PLAN_FOLDER, known_name, pictures_name
from wallaroo.workflows.outputs.schema import json_columns
from wallaroo.workflows.plans.columns import carried_schema, parameter_columns
from wallaroo.workflows.plans.plan import Round
from wallaroo.workflows.plans.settings import PlanSettings, column_names
from wallaroo.workflows.sources.embedded import COLUMN, parse_cell, split_column
from wallaroo.workflows.sources.references import SourceOptions, locate, parts_of

PAIR = np.dtype([("id_high", "u8"), ("id_low", "u8"), ("row_high", "u8"), ("row_low", "u8")])
"""Digests of a row's id and of all its values, 128 bits each."""

_ID = ["id_high", "id_low"]


class PlannedPairs(NamedTuple):
    """All rows that earlier rounds have planned."""

    pairs: np.ndarray
    """PAIR [rows]: digests of each row."""
    versions: np.ndarray
    """int32 [rows]: the version that each row has among the rows of its id, from 0."""

    def new(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the rows that no round has planned.

        Args:
            pairs: PAIR [n], digests of the rows in question.

        Returns:
            bool [n], whether a row is new, and int32 [n], the version that it would get.
        """
        fresh = ~np.isin(_bytes(pairs), _bytes(self.pairs))
        ids = np.concatenate([self.pairs[_ID], pairs[_ID]])
        unique, place = np.unique(_bytes(ids), return_inverse=True)
        following = np.zeros(len(unique), np.int32)
        np.maximum.at(following, place[: len(self.pairs)], self.versions + 1)
        return fresh, following[place[len(self.pairs) :]]


def _bytes(pairs: np.ndarray) -> np.ndarray:
    """Packs each row into one value, which sorts and compares as a whole."""
    names = pairs.dtype.names or ()
    columns = np.stack([pairs[name] for name in names], axis=1).astype(">u8")
    # numpy drops zeros at the end of fixed-length bytes, so each ends with a one.
    raw = np.concatenate([columns.view(np.uint8), np.ones((len(pairs), 1), np.uint8)], axis=1)
    return np.ascontiguousarray(raw).view(f"S{raw.shape[1]}").ravel()


def read_planned(output: str, rounds: Iterable[Round]) -> PlannedPairs:
    """Reads the digests of all rows that a plan has so far.

    Args:
        output: Folder of the run, local or on S3.
        rounds: Rounds of its plan.

    Returns:
        The rows of all rounds, in their order.

    Raises:
        InputError: The file of a round is gone or corrupt.
    """
    pairs, versions = [np.empty(0, PAIR)], [np.empty(0, np.int32)]
    for one in rounds:
        path = storage.join(output, PLAN_FOLDER, one.known)
        try:
            table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
        except (pa.ArrowException, OSError):
            raise InputError(
                f"{path}, which lists the rows planned so far, is missing or corrupt: restore it."
            ) from None
        found = np.empty(table.num_rows, PAIR)
        for name in PAIR.names or ():
            found[name] = table.column(name).to_numpy()
        pairs.append(found)
        versions.append(table.column("version").to_numpy())
    return PlannedPairs(np.concatenate(pairs), np.concatenate(versions))


def write_planned(output: str, pairs: np.ndarray, versions: np.ndarray) -> str:
    """Writes the digests of the rows of a round beside the plan.

    Args:
        output: Folder of the run, local or on S3.
        pairs: PAIR [rows].
        versions: int32 [rows].

    Returns:
        Name of the file in `plan/`. It is a digest of the contents, so equal rows give one file.
    """
    columns = {name: pairs[name] for name in PAIR.names or ()} | {"version": versions.astype(np.int32)}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    name = known_name(hashlib.sha256(sink.getvalue()).hexdigest()[:16])
    storage.write_atomic(storage.join(output, PLAN_FOLDER, name), sink.getvalue())
    return name


# Rows


def row_pairs(
    table: pa.Table, ids: Sequence[str], settings: PlanSettings, folder: str, faults: Sequence[str], when: str
) -> np.ndarray:
    """Digests manifest rows, and the listed size and etag of the pictures that they name.

    Args:
        table: Some rows of a manifest.
        ids: The id of each row.
        settings: Settings of the run.
        folder: Where relative paths of pictures start, unless the settings name a folder.
        faults: Why a row cannot be read, row by row; empty for a row that can.
        when: Any text that is the same during one planning. A process lists a folder of sources once for it.

    Returns:
        PAIR [rows].
    """
    allowed = SourceOptions(settings.image_root or folder, https=settings.allow_https)
    pairs = np.empty(len(ids), PAIR)
    picture = column_names(table.schema, settings).get(COLUMN, COLUMN)
    for index, (name, values, fault) in enumerate(zip(ids, table.to_pylist(), faults, strict=True)):
        # Nulls are left out, so that a new column that is empty here does not change the row.
        said = sorted((key, value) for key, value in values.items() if value is not None)
        source = _source(values.get(picture), allowed, when) if picture in values else None
        pairs[index] = (*_digest(name), *_digest(repr((said, fault, source))))
    return pairs


def _digest(text: str) -> tuple[int, int]:
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(found[:8], "big"), int.from_bytes(found[8:], "big")


def _source(reference: Any, allowed: SourceOptions, when: str) -> tuple[str, int, str] | None:
    """Address, size and etag of a picture that is a file; None for any other picture."""
    try:
        data, path = parts_of(reference)
        if data is not None or path is None:
            return None
        cell = parse_cell(path)
        place = locate(split_column(cell.path)[0] if cell else path, allowed)
    except RowError:
        return None
    if storage.is_s3(place):
        found = _listing(place.rpartition("/")[0], when).get(place)
    else:
        found = None if place.startswith("https://") else storage.info(place)
    return (place, found.size, found.etag) if found else (place, 0, "")


@functools.lru_cache(maxsize=16)
def _listing(folder: str, when: str) -> dict[str, storage.FileInfo]:
    return {file.path: file for file in storage.list_files(folder)}


# Manifests


def unseen(manifest: Manifest, rounds: Sequence[Round], settings: PlanSettings) -> Manifest:
    """Selects the files of a manifest that may have new rows.

    A file that a round has read to its end is left out, unless its rows name sources that could change.

    Args:
        manifest: The manifest as it is now.
        rounds: Rounds of the plan so far.
        settings: Settings of the run.

    Returns:
        The manifest with these files alone.
    """
    seen = {tuple(one) for round_ in rounds for one in round_.manifest}
    changing = settings.task != "generate"
    files = [
        file
        for file, identity in zip(manifest.files, manifest.identity(), strict=True)
        if (changing and file.format not in ("results", "pictures")) or tuple(identity) not in seen
    ]
    return dataclasses.replace(manifest, files=tuple(files))


def picture_pairs(files: Sequence[storage.FileInfo]) -> np.ndarray:
    """Digests the pictures of a folder from their listing alone.

    Args:
        files: The pictures as listed.

    Returns:
        PAIR [files].
    """
    pairs = np.empty(len(files), PAIR)
    for index, file in enumerate(files):
        pairs[index] = (*_digest(file.relative), *_digest(repr((file.path, file.size, file.etag))))
    return pairs


def write_pictures(output: str, files: Sequence[storage.FileInfo]) -> ManifestFile:
    """Writes a manifest of pictures beside the plan.

    All tasks that plan these pictures read it, so they see the same ones if the folder changes meanwhile.

    Args:
        output: Folder of the run, local or on S3.
        files: The pictures as listed.

    Returns:
        The written manifest file. Its name is a digest of its contents.
    """
    lines = [json.dumps({"id": file.relative, COLUMN: file.path}) + "\n" for file in files]
    data = "".join(lines).encode()
    digest = hashlib.sha256(data).hexdigest()[:16]
    path = storage.join(output, PLAN_FOLDER, pictures_name(digest))
    storage.write_atomic(path, data)
    return ManifestFile(path, "pictures", "jsonl", len(data), digest)


def joined_schema(found: pa.Schema, rounds: Sequence[Round], settings: PlanSettings) -> pa.Schema:
    """Builds the schema for rows of a later round: that of the first, and new parameter columns.

    Args:
        found: Schema of the manifest as it is now.
        rounds: Rounds of the plan so far.
        settings: Settings of the run.

    Returns:
        The schema; `found` if there are no rounds.

    Raises:
        InputError: A column has changed its type, or there is a new column to carry.
    """
    if not rounds:
        return found
    first = decode_schema(rounds[0].schema)
    fields = {field.name: field for field in first}
    for field in found:
        old = fields.get(field.name)
        if old is None:
            if field.name not in parameter_columns(found, settings):
                raise InputError(
                    f"The manifest has the new column '{field.name}', but all rows of an output have the "
                    f"same columns: leave it out, or give a new output."
                )
            fields[field.name] = field
        elif old.type != field.type and not _fits(field, old):
            raise InputError(
                f"Column '{field.name}' of the manifest is {field.type}, but was {old.type} before: "
                f"give it the type it had, or give a new output."
            )
    if json_columns(found) - json_columns(first):
        name = min(json_columns(found) - json_columns(first))
        raise InputError(
            f"Column '{name}' of the manifest has values of several types, which it had not before: "
            f"give it the type it had, or give a new output."
        )
    joined = pa.schema(fields.values(), metadata=first.metadata)
    check_carried(joined, rounds, settings)
    return joined


def check_carried(schema: pa.Schema, rounds: Sequence[Round], settings: PlanSettings) -> None:
    """Checks that the manifest still has the carried columns that the plan began with.

    Args:
        schema: Schema of the manifest.
        rounds: Rounds of the plan so far.
        settings: Settings of the run.

    Raises:
        InputError: A column is read as a parameter that an earlier version carried through, or the reverse.
    """
    if not rounds:
        return
    before, now = rounds[0].carried.names, carried_schema(schema, settings).names
    if differing := sorted({*before} ^ {*now}):
        use = "carried" if differing[0] in now else "read"
        raise InputError(
            f"Column '{differing[0]}' of the manifest is {use} by this version, but was not when the output "
            f"was begun: give a new output, or use the version that began it."
        )


def _fits(field: pa.Field, old: pa.Field) -> bool:
    try:
        unified = pa.unify_schemas([pa.schema([old]), pa.schema([field])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return unified.field(0).type == old.type
