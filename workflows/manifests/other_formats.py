"""Manifests of other kinds: ImgEdit's JSON, folders of pictures or of texts, outputs of a run."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.manifests.layouts import CAPTION
from wallaroo.workflows.manifests.listing import (
    captions,
    is_picture,
    is_small_text,
    list_manifest,
    list_pictures,
    visible,
)
from wallaroo.workflows.manifests.parquet_files import open_parquet, parquet_batches
from wallaroo.workflows.manifests.schema import is_text, kind_of, mended, text_table, to_table
from wallaroo.workflows.manifests.streams import GIT_LFS, is_unmarked_utf16
from wallaroo.workflows.manifests.text_files import is_deep
from wallaroo.workflows.manifests.types import (
    BATCH_ROWS,
    PIECE_ROWS,
    Batch,
    ManifestFile,
    Piece,
    Scan,
    check_width,
)
from wallaroo.workflows.outputs.layout import shard_name, shard_number
from wallaroo.workflows.outputs.schema import CARRIED_PREFIX, JSON_MARK, TEXT_TASKS, json_columns, lacking
from wallaroo.workflows.sources.embedded import COLUMN, Cell

TEXT_BYTES = 1 << 20
"""Most bytes of a text file that is a caption or a prompt."""


def _imgedit_rows(file: ManifestFile) -> list[dict[str, Any]]:
    """Reads ImgEdit's JSON, an object of entries by key, whose `id` is the path of the source picture."""
    try:
        found = json.loads(storage.read_bytes(file.path))
        if is_deep(found):
            raise RecursionError
        rows = [{**entry, "id": key, COLUMN: entry.get("id")} for key, entry in found.items()]
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise InputError(
            f"{file.path} is not an object of keys, each with id, prompt and edit_type, which is the JSON "
            f"that edit reads: write one object a line and name the file .jsonl."
        ) from None
    check_width(file, list({name: None for row in rows for name in row}))
    return [json.loads(mended(json.dumps(row, ensure_ascii=False))) for row in rows]


def scan_imgedit(file: ManifestFile) -> Scan:
    """Scans a JSON file of ImgEdit: one piece, with the kinds of values in each column."""
    rows = _imgedit_rows(file)
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(kind_of(value))
    return Scan([Piece(file, 0, len(rows), 0, file.size)] if rows else [], kinds=kinds)


def read_imgedit(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads the rows of ImgEdit's JSON.

    Args:
        piece: The whole file.
        schema: Schema of the manifest.

    Yields:
        Batches of rows.
    """
    rows, marked = _imgedit_rows(piece.file), json_columns(schema)
    for start in range(0, len(rows), BATCH_ROWS):
        yield Batch(start, text_table(rows[start : start + BATCH_ROWS], schema, marked), {})


def scan_pictures(file: ManifestFile) -> Scan:
    """Scans a folder of pictures: one row a picture, with a `caption` if any has a text of the same name."""
    pictures, captions_of = _pictures(file)
    fields = [("id", pa.string()), (COLUMN, pa.string())]
    fields += [(CAPTION, pa.string())] if captions_of else []
    return Scan(_pieces(file, len(pictures)), pa.schema(fields))


def _pieces(file: ManifestFile, count: int) -> list[Piece]:
    starts = range(0, count, PIECE_ROWS)
    return [Piece(file, start, min(PIECE_ROWS, count - start), start, start) for start in starts]


def _pictures(file: ManifestFile) -> tuple[list[storage.FileInfo], dict[str, storage.FileInfo]]:
    """Lists the pictures of a manifest file, and the texts beside them by path without suffix."""
    if storage.exists(file.path):
        return list_pictures(file.path), {}
    files = visible(list_manifest(file.path))[0]
    texts = captions(files)
    pictures = [one for one in files if is_picture(one.relative)]
    stems = {os.path.splitext(one.relative)[0] for one in pictures} if texts else set()
    return pictures, {stem: text for stem, text in texts.items() if stem in stems}


def read_pictures(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads rows of a folder of pictures.

    Args:
        piece: Some pictures in the order of their names.
        schema: Schema of the manifest.

    Yields:
        Batches of rows with `id`, `image` and `caption`, as far as the schema has them.
    """
    files, captions_of = _pictures(piece.file)
    files = files[piece.first_row : piece.first_row + piece.rows]
    for start in range(0, len(files), BATCH_ROWS):
        few = files[start : start + BATCH_ROWS]
        faults: dict[int, str] = {}
        columns: dict[str, list[str | None]] = {
            "id": [mended(one.relative) for one in few],
            COLUMN: [mended(one.path) for one in few],
            CAPTION: [None] * len(few),
        }
        for row, one in enumerate(few):
            text = captions_of.get(os.path.splitext(one.relative)[0])
            if not is_text(one.path):
                faults[piece.first_row + start + row] = "has a name that is not valid UTF-8"
            elif text is not None and CAPTION in schema.names:
                columns[CAPTION][row], fault = _text_of(text)
                if fault:
                    faults[piece.first_row + start + row] = f"has a caption that {fault}"
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        yield Batch(piece.first_row + start, to_table(arrays, schema, len(few)), faults)


def _text_of(file: storage.FileInfo) -> tuple[str, str]:
    """Reads a small text file. Returns its text and what is wrong with it."""
    if file.size > TEXT_BYTES:
        return "", f"has {file.size:,} bytes, more than {TEXT_BYTES:,}"
    data = storage.read_bytes(file.path)
    if data.startswith(GIT_LFS):
        return "", "is a pointer of Git LFS, not the text itself; fetch it with `git lfs pull`"
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    if encoding != "utf-16" and is_unmarked_utf16(data):
        return "", "is UTF-16 without a mark at its start; save it as UTF-8"
    try:
        return data.decode(encoding).strip(), ""
    except UnicodeDecodeError:
        return mended(data.decode(encoding, "replace")), "is not valid UTF-8"


def scan_prompts(file: ManifestFile) -> Scan:
    """Scans a folder of texts: one row a text, whose id is its name without the suffix."""
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    return Scan(_pieces(file, len(_texts(file))), schema)


def _texts(file: ManifestFile) -> list[storage.FileInfo]:
    return [one for one in visible(list_manifest(file.path))[0] if is_small_text(one.relative)]


def _ids(files: Sequence[storage.FileInfo]) -> list[str]:
    """The names of texts without suffix; with it where two differ by its case."""
    stems = [os.path.splitext(one.relative)[0] for one in files]
    counts = Counter(stems)
    return [
        mended(stem if counts[stem] == 1 else one.relative) for stem, one in zip(stems, files, strict=True)
    ]


def read_prompts(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads rows of a folder of texts.

    Args:
        piece: Some texts in the order of their names.
        schema: Schema of the manifest.

    Yields:
        Batches of rows with `id` and `prompt`, as far as the schema has them.
    """
    files = _texts(piece.file)
    ids = _ids(files)
    for start in range(piece.first_row, piece.first_row + piece.rows, BATCH_ROWS):
        stop = min(start + BATCH_ROWS, piece.first_row + piece.rows)
        faults, columns = {}, {"id": ids[start:stop]}
        if "prompt" in schema.names:
            columns["prompt"] = []
            for row, one in enumerate(files[start:stop], start):
                text, fault = _text_of(one)
                columns["prompt"].append(text)
                if fault:
                    faults[row] = fault
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        yield Batch(start, to_table(arrays, schema, len(columns["id"])), faults)


def scan_results(file: ManifestFile) -> Scan:
    """Scans a shard of a run's output, of which ok rows are read.

    Args:
        file: The file of the shard.

    Returns:
        Its piece, and its schema: `id`, `image` (a reference), and all other columns with CARRIED_PREFIX.

    Raises:
        InputError: It is no file of results.
    """
    with open_parquet(file) as parquet:
        theirs = parquet.schema_arrow
        if words := lacking(theirs):
            raise InputError(f"{file.path} says that it is a file of results, but {words}: leave it out.")
        ok = parquet.read(columns=["status"]).column("status").to_pylist().count("ok")
        groups = parquet.metadata.num_row_groups
    fields = [field.with_name(CARRIED_PREFIX + field.name) for field in theirs if field.name != COLUMN]
    marked = [CARRIED_PREFIX + name for name in json_columns(theirs)]
    metadata = {JSON_MARK: json.dumps(sorted(marked)).encode()} if marked else None
    schema = pa.schema([("id", pa.string()), (COLUMN, pa.string()), *fields], metadata=metadata)
    return Scan([Piece(file, 0, ok, 0, groups)] if ok else [], schema)


def read_results(piece: Piece, schema: pa.Schema) -> Iterator[Batch]:
    """Reads the ok rows of a shard.

    Args:
        piece: The whole file.
        schema: Schema of the manifest.

    Yields:
        Batches of rows. An id with several samples becomes `id/sample`.
    """
    path, first = piece.file.path, 0
    wanted = [name.removeprefix(CARRIED_PREFIX) for name in schema.names if name.startswith(CARRIED_PREFIX)]
    needed = {"row_id", "id", "sample", "status", "task", "source", *wanted}
    with open_parquet(piece.file) as parquet:
        several = _with_samples(path, parquet)
        names = [name for name in parquet.schema_arrow.names if name in needed]
        for chunk in parquet_batches(piece.file, parquet, names):
            table = pa.Table.from_batches([chunk])
            table = table.filter([status == "ok" for status in table.column("status").to_pylist()])
            rows = table.select(["row_id", "id", "sample", "task", "source"]).to_pylist()
            made = {
                "id": [f"{row['id']}/{row['sample']}" if row["id"] in several else row["id"] for row in rows],
                COLUMN: [_picture_of(path, row) for row in rows],
            }
            columns = [
                pa.array(made[field.name], field.type)
                if field.name in made
                else table.column(field.name.removeprefix(CARRIED_PREFIX)).cast(field.type)
                for field in schema
            ]
            yield Batch(first, to_table(columns, schema, len(rows)), {})
            first += len(rows)


def _picture_of(path: str, row: dict[str, Any]) -> str | None:
    """Finds the picture of a result: in its own row, or the source if the result is a text."""
    if row["task"] not in TEXT_TASKS:
        return str(Cell(path, row["row_id"]))
    source = row["source"] or {}
    if source.get("row_id") is None:
        return source.get("uri")
    return str(Cell(source["uri"], source["row_id"]))


def _with_samples(path: str, parquet: pq.ParquetFile) -> set[str]:
    """Finds the ids of a shard with several samples. The last one may continue in the next shard."""
    table = parquet.read(columns=["id", "sample"])
    ids, samples = table.column("id").to_pylist(), table.column("sample").to_pylist()
    several = {one for one, sample in zip(ids, samples, strict=True) if sample}
    if ids and ids[-1] not in several:
        number = shard_number(os.path.basename(path))
        following = storage.join(path.rpartition("/")[0], shard_name((number or 0) + 1))
        if storage.exists(following):
            filesystem, inner = storage.parquet_filesystem(following)
            with filesystem.open_input_file(inner) as file, pq.ParquetFile(file) as after:
                first = next(after.iter_batches(1, columns=["id", "sample"])).to_pylist()[0]
                if first["sample"] and first["id"] == ids[-1]:
                    several.add(ids[-1])
    return several
