"""What a run leaves behind: the columns of `data/`, one Parquet file a shard, and the files beside it.

A shard's file has a name and rows that follow from the plan alone, and is there whole or not at all, so
a list of `data/` says what is done. Knows nothing of Ray, of how a picture is made, or of manifests.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import platform
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.config import TASKS
from model.errors import InputError
from workflows import storage
from workflows.sources import restore_size
from workflows.tasks import EXACT

if TYPE_CHECKING:
    from actors.rows import Outcome

FORMAT = 1
"""Version of everything this module writes; a reader refuses what it does not know."""

RUN_FILE = "run.json"
DATA_FOLDER = "data"

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SOURCE_TYPE = pa.struct(
    [
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("row_id", pa.int64()),
    ]
)
RESULT_FIELDS = (
    pa.field("row_id", pa.int64()),
    pa.field("shard", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("version", pa.int32()),
    pa.field("sample", pa.int32()),
    pa.field("task", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("image", IMAGE_TYPE),
    pa.field("mime_type", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("sha256", pa.string()),
    pa.field("text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("output_tokens", pa.int32()),
    pa.field("source", SOURCE_TYPE),
    pa.field("seed", pa.int64()),
    pa.field("cfg", pa.float64()),
    pa.field("temperature", pa.float64()),
    pa.field("top_k", pa.int32()),
    pa.field("top_p", pa.float64()),
    pa.field("language", pa.string()),
    pa.field("mode", pa.string()),
    pa.field("model_digest", pa.string()),
    pa.field("config_digest", pa.string()),
    pa.field("environment_digest", pa.string()),
    pa.field("content_digest", pa.string()),
    pa.field("attempts", pa.int32()),
    pa.field("replica", pa.string()),
    pa.field("started_at", pa.timestamp("us", tz="UTC")),
    pa.field("seconds", pa.float64()),
)
TOKENS_FIELD = pa.field("tokens", pa.list_(pa.int32()))
RESULT_NAMES = frozenset(field.name for field in (*RESULT_FIELDS, TOKENS_FIELD))
"""Names that a carried column cannot have; it comes as `in_<name>` instead."""

VOLATILE = ("attempts", "replica", "started_at", "seconds")
"""The columns that may differ when a shard is made again; all others may not."""

JSON_MARK = b"wallaroo.json"
"""Key of the schema metadata: a JSON list of the carried columns that hold JSON text."""

PICTURE_ROWS = 32
"""Rows of a row group with pictures: whoever wants one of them reads these, not the whole shard."""

TEXT_TASKS = frozenset({"understand"})
"""Tasks whose results are texts; those of all others are pictures."""

MIME_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}

_SHARD_NAME = re.compile(r"shard-(\d{8,})\.parquet")

T = TypeVar("T")


# Schema


def result_schema(carried: pa.Schema, save_tokens: bool = False) -> pa.Schema:
    """The one schema of all files of `data/`: ours, `tokens` if saved, then the carried columns.

    It is the schema as Parquet gives it back (which has no seconds in timestamps, for instance), so a
    file's schema can be compared with it exactly. Its metadata tells Hugging Face `datasets` that
    `image` holds pictures. Raises ValueError where a carried column has a name of ours.
    """
    taken = [name for name in carried.names if name in RESULT_NAMES]
    if taken:
        raise ValueError(f"carried columns {taken} have names of result columns")
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    metadata = {b"wallaroo.format": str(FORMAT).encode()}
    for key, value in (carried.metadata or {}).items():
        if key.startswith(b"wallaroo."):
            metadata[key] = value
        elif key == b"huggingface":
            features |= {k: v for k, v in _features(value).items() if k in carried.names}
    metadata[b"huggingface"] = json.dumps({"info": {"features": features}}, sort_keys=True).encode()
    ours = [*RESULT_FIELDS, TOKENS_FIELD] if save_tokens else [*RESULT_FIELDS]
    # Fields read from Parquet may bring field ids along, which would be given out twice.
    others = [field.remove_metadata() for field in carried]
    return _as_stored(pa.schema([*ours, *others], metadata=metadata))


def json_columns(schema: pa.Schema) -> frozenset[str]:
    """Names of the columns that hold JSON text, as a file of ours says; what else may stand there is none."""
    try:
        names = json.loads((schema.metadata or {}).get(JSON_MARK, b"[]"))
    except (ValueError, RecursionError):
        names = []
    if not isinstance(names, list):
        names = []
    texts = {field.name for field in schema if field.type == pa.string()}
    return frozenset(name for name in names if isinstance(name, str) and name in texts)


def _features(value: bytes) -> dict[str, Any]:
    """Features that a Hugging Face file declares; none where the metadata is not what it should be."""
    try:
        features = json.loads(value)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _as_stored(schema: pa.Schema) -> pa.Schema:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(schema.empty_table(), sink)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(
            f"a column of the manifest has a type that Parquet cannot hold ({error}): "
            f"leave it out or give it another type."
        ) from error
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


# Names


def shard_name(shard: int) -> str:
    """File name of a shard, such as `shard-00000123.parquet`."""
    return f"shard-{shard:08d}.parquet"


def shard_path(output: str, shard: int) -> str:
    """Where the rows of a shard lie."""
    return storage.join(output, DATA_FOLDER, shard_name(shard))


def shard_number(name: str) -> int | None:
    """The shard whose file has this name; None for any other file."""
    match = _SHARD_NAME.fullmatch(name)
    number = int(match.group(1)) if match else None
    return number if number is not None and shard_name(number) == name else None


def list_done(output: str) -> set[int]:
    """Numbers of the shards that are there. One listing; no file is opened."""
    found = (shard_number(info.relative) for info in storage.list_files(storage.join(output, DATA_FOLDER)))
    return {number for number in found if number is not None}


# Digests


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 JSON text of a plain value: keys sorted, no spaces, 3.0 as 3. Refuses NaN."""
    text = json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def digest(value: Any) -> str:
    """sha256, in hex, of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def environment(device: str, threads: int, shapes: Mapping[str, int]) -> dict[str, Any]:
    """What may change a picture by rounding only; its `digest` stands in every row.

    device: the device's model name, `cpu` or that of the GPU. threads: CPU threads of the engine.
    shapes: the sizes that its operators run at (rows of a group, tokens of a chunk and so on).
    """
    versions = {}
    for name in ("torch", "pillow", "wallaroo-batch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "device": device,
        # Kernels are chosen by instruction set.
        "machine": platform.machine(),
        "threads": threads,
        "shapes": dict(shapes),
        "versions": versions,
    }


# Rows


@dataclass(frozen=True)
class RunConstants:
    """What is the same in every row of a run.

    task, mode: `generate` and the like; `mode` names lossy shortcuts, and is EXACT without any.
    model_digest, config_digest: hex. image_format: `png`, `webp` or `jpeg`; image_quality as for
    `encode_image`. templates: language -> prompt template, where the built-in one is replaced.
    restore_size: whether a picture gets the size of its source. max_new_tokens: the most tokens of a text.
    """

    task: str
    model_digest: str
    config_digest: str
    mode: str = EXACT
    image_format: str = "png"
    image_quality: int | None = None
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restore_size: bool = False
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Made:
    """Who made the rows of a shard: a replica's name for people, its environment's digest, and how many
    attempts it took."""

    replica: str = ""
    environment_digest: str = ""
    attempts: int = 1


def encode_image(pixels: np.ndarray, image_format: str, quality: int | None = None) -> tuple[bytes, str]:
    """Pixels (uint8 [H, W, 3], RGB) as a file, and its MIME type; equal pixels give equal bytes.

    `png` and, without a quality, `webp` are lossless. `quality` (1 to 100) makes `webp` lossy and is
    that of `jpeg` (95 if None), which keeps its colours at full resolution.
    """
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3]")
    options: dict[str, Any]
    if image_format == "png":
        options = {"compress_level": 6}
    elif image_format == "webp":
        options = {"lossless": True} if quality is None else {"quality": quality}
        options["method"] = 4
    elif image_format == "jpeg":
        options = {"quality": 95 if quality is None else quality, "subsampling": "4:4:4"}
    else:
        raise ValueError(f"image format '{image_format}', expected one of {', '.join(MIME_TYPES)}")
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, image_format.upper(), **options)
    return sink.getvalue(), MIME_TYPES[image_format]


def image_path(row_id: int, image_format: str) -> str:
    """Name of a row's picture inside the data set; made of its number, never of a user's words."""
    return f"row-{row_id:08d}.{'jpg' if image_format == 'jpeg' else image_format}"


def build_result_table(
    plan: pa.Table,
    outcomes: Iterable["Outcome"],
    run: RunConstants,
    made: Made,
    schema: pa.Schema,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> pa.Table:
    """The rows of one shard as they will stand in `data/`, in the order of the plan.

    plan: the plan's rows of the shard, the carried columns among them, and for tasks with a picture to
    start from the column `source`. Whoever loads the pictures adds to a copy of the plan what can only
    be known then: sha256, width and height of `source`, and error rows of kind `image`. outcomes: one of
    every row that this plan did not refuse, in any order. schema: from `result_schema`. decode: token
    ids -> text; needed where the results are texts.
    Raises ValueError if a row has no outcome, or an outcome no row: none may be lost on the way.
    """
    rows = plan.select([name for name in plan.column_names if name in RESULT_NAMES]).to_pylist()
    planned = {position for position, row in enumerate(rows) if row["status"] != "error"}
    given = list(outcomes)
    by_row = {outcome.row: outcome for outcome in given}
    if planned != set(by_row) or len(given) != len(by_row):
        lost, extra = sorted(planned - set(by_row)), sorted(set(by_row) - planned)
        raise ValueError(
            f"{len(given)} outcomes for {len(planned)} rows of a shard: "
            f"without an outcome are {lost[:5]}, without a row {extra[:5]}"
        )
    built = [_result_row(row, by_row.get(position), run, made, decode) for position, row in enumerate(rows)]
    columns = []
    for field in schema:
        if field.name in RESULT_NAMES:
            columns.append(pa.array([row.get(field.name) for row in built], type=field.type))
        else:
            columns.append(plan.column(field.name).cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _result_row(
    planned: dict[str, Any],
    outcome: "Outcome | None",
    run: RunConstants,
    made: Made,
    decode: Callable[[Sequence[int]], str] | None,
) -> dict[str, Any]:
    row = {
        **planned,
        "task": run.task,
        "mode": run.mode,
        "model_digest": run.model_digest,
        "config_digest": run.config_digest,
        "status": "error",
        "mime_type": "",
        "sha256": "",
        "text": "",
        "finish_reason": "",
        "prompt_tokens": 0,
        "output_tokens": 0,
        "environment_digest": "",
        "content_digest": "",
        "attempts": 0,
        "replica": "",
    }
    if outcome is None:
        return row
    row |= {
        "prompt_tokens": outcome.prompt_tokens,
        "attempts": made.attempts,
        "replica": made.replica,
        "started_at": outcome.started_at,
        "seconds": outcome.seconds,
    }
    if outcome.error_type:
        return row | {"error_type": outcome.error_type, "error_message": outcome.error_message}
    textual = run.task in TEXT_TASKS
    if outcome.tokens is None or (outcome.pixels is None) != textual:
        raise ValueError(f"row {row['row_id']} is ok, but has no {'text' if textual else 'picture'}")
    row |= {
        "status": "ok",
        "error_type": "",
        "error_message": "",
        "finish_reason": outcome.finish_reason,
        "output_tokens": len(outcome.tokens),
        "tokens": np.asarray(outcome.tokens, np.int32),
        "environment_digest": made.environment_digest,
    }
    if textual:
        if decode is None:
            raise ValueError(f"row {row['row_id']} is a text, but nothing decodes it")
        row |= _text_values(decode(outcome.tokens.tolist()))
    else:
        pixels = outcome.pixels
        assert pixels is not None
        if run.restore_size:
            pixels = restore_size(pixels, row["source"]["height"], row["source"]["width"])
        row |= _picture_values(row["row_id"], pixels, run)
    return row | {"content_digest": _content_digest(row, run)}


def _picture_values(row_id: int, pixels: np.ndarray, run: RunConstants) -> dict[str, Any]:
    """The columns of a result that is a picture."""
    encoded, mime_type = encode_image(pixels, run.image_format, run.image_quality)
    return {
        "image": {"bytes": encoded, "path": image_path(row_id, run.image_format)},
        "mime_type": mime_type,
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }


def _text_values(text: str) -> dict[str, Any]:
    """The columns of a result that is a text: it has no size, and its `sha256` is of its UTF-8 bytes."""
    return {"text": text, "height": None, "width": None, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _content_digest(row: Mapping[str, Any], run: RunConstants) -> str:
    """Digest of all that makes a result what it is, and of nothing that only names or places it.

    Rows of two runs with the same one hold the same result, up to the rounding of their environments.
    """
    named = ("task", "mode", "model_digest", "prompt", "language", "width", "height", "seed")
    fields = {name: row[name] for name in (*named, "cfg", "temperature", "top_k", "top_p")}
    if run.task in TEXT_TASKS:
        fields["max_new_tokens"] = run.max_new_tokens
    else:
        fields |= {"image_format": run.image_format, "image_quality": run.image_quality}
    fields["source"] = (row.get("source") or {}).get("sha256")
    fields["template"] = run.templates.get(row["language"] or "")
    return digest(fields)


# Shards


def shard_bytes(table: pa.Table) -> pa.Buffer:
    """A result table as a Parquet file; equal tables give equal bytes."""
    leaves = _leaf_columns(table.schema)
    # Pictures are compressed already; dictionaries and statistics of them would only cost.
    others = [leaf for leaf in leaves if leaf != "image.bytes"]
    pictures = table.column("image").null_count < len(table)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=PICTURE_ROWS if pictures else max(len(table), 1),
        compression={leaf: "none" if leaf == "image.bytes" else "zstd" for leaf in leaves},
        use_dictionary=others,
        write_statistics=others,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _leaf_columns(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    stored = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(index).path for index in range(len(stored))]


def write_shard(output: str, shard: int, table: pa.Table) -> int:
    """Writes the file of a shard, whole or not at all, and returns its size in bytes.

    table: from `build_result_table`. Written twice, it is the same file but for VOLATILE columns.
    """
    if pc.any(pc.not_equal(table.column("shard"), shard)).as_py():
        raise ValueError(f"the table of shard {shard} holds rows of another shard")
    data = shard_bytes(table)
    storage.write_atomic(shard_path(output, shard), memoryview(data))
    return data.size


@functools.cache
def _own_fields() -> tuple[pa.Field, ...]:
    return tuple(result_schema(pa.schema([])))


def lacking(schema: pa.Schema) -> str:
    """Why a file with this schema is none of results, in words; empty if it may be one."""
    for field in _own_fields():
        if schema.names.count(field.name) != 1 or schema.field(field.name).type != field.type:
            return f"it has no column {field.name} of type {field.type}"
    return ""


@contextmanager
def open_shard(output: str, shard: int) -> Iterator[pq.ParquetFile]:
    """The file of a shard, for reading row group by row group.

    Raises FileNotFoundError, and ArrowInvalid if another file lies in its place.
    """
    path = shard_path(output, shard)
    filesystem, inner = storage.parquet_filesystem(path)
    with (
        storage.explained(path),
        filesystem.open_input_file(inner) as file,
        pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True) as parquet,
    ):
        if words := lacking(parquet.schema_arrow):
            raise pa.ArrowInvalid(words)
        yield parquet


def map_shards(function: Callable[[int], T], shards: Iterable[int], threads: int = 8) -> Iterator[T]:
    """`function(shard)` of every shard, in their order, a few at a time and never far ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for shard in shards:
                ahead.append(pool.submit(function, shard))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


# run.json


def put_run(output: str, fields: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
    """Makes `run.json`, or checks that the one there is of the same run.

    fields: plain JSON values of what may change a row by meaning. options: others, kept to be read.
    Raises InputError, naming every key that differs with both values, if the output is another run's.
    """
    path = storage.join(output, RUN_FILE)
    document = {"format": FORMAT, "config_digest": digest(fields), "config": fields, "options": options or {}}
    if storage.put_if_absent(path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"):
        return
    there, here = flat(read_run(output)["config"]), flat(fields)
    differing = [key for key in sorted({*there, *here}) if _plain(there.get(key)) != _plain(here.get(key))]
    if differing:
        words = "; ".join(
            f"{key} is {_shown(there, key)} there and {_shown(here, key)} here" for key in differing
        )
        raise InputError(
            f"the output {output} belongs to another run: {words}; "
            f"give another output folder, or the values it was made with."
        )


def read_run(output: str) -> dict[str, Any]:
    """What `run.json` says: `format`, `config_digest`, `config`, `options`.

    Raises InputError if there is none, so that this is no output of ours, or it cannot be read.
    """
    path = storage.join(output, RUN_FILE)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise InputError(
            f"{output} is not the output of a run, since it has no {RUN_FILE}: give the folder of one."
        ) from None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}): restore it, or give another output folder."
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise InputError(
            f"{path} has format {found!r:.80}, but this version reads {FORMAT}: use the version that made it."
        )
    config, options = document.get("config"), document.get("options")
    whole = isinstance(config, dict) and isinstance(options, dict) and config.get("task") in TASKS
    if not (whole and isinstance(document.get("config_digest"), str)):
        raise InputError(
            f"{path} lacks config, its task or options: restore it, or give another output folder."
        )
    return document


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `sampling.cfg`."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
