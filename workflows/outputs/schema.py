"""The columns of `data/`, in one Arrow schema."""

import functools
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from wallaroo.model.errors import InputError

FORMAT = 1
"""Version of everything that this module writes. A reader refuses any other."""
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
NOTED_SOURCE_TYPE = pa.struct([*SOURCE_TYPE, ("note", pa.string())])
"""`SOURCE_TYPE` with a note on the picture, such as a colour profile that is broken."""
NOTE_MARK = b"wallaroo.source_note"
"""Key in the metadata of plans whose sources have a note. Plans of version 0.1.0 lack it."""
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
"""Names that a carried column cannot have; CARRIED_PREFIX goes before such a name."""
CARRIED_PREFIX = "in_"
"""Before the name of a carried column that would be one of RESULT_NAMES, and of every column of an output
that is the manifest of another run."""
VOLATILE = ("attempts", "replica", "started_at", "seconds")
"""Columns that may differ when a shard is made again. No other may."""
JSON_MARK = b"wallaroo.json"
"""Key in the metadata of a schema: a JSON list of the carried columns that hold JSON text."""
TEXT_TASKS = frozenset({"understand"})
"""Tasks whose results are texts. All others give pictures."""
MIME_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def result_schema(carried: pa.Schema, save_tokens: bool = False) -> pa.Schema:
    """Builds the schema of all files of `data/`.

    It is the schema as Parquet gives it back, so a file's schema can be compared with it exactly. (Parquet
    has no timestamps in seconds, for example.) Its metadata tells Hugging Face `datasets` that `image` holds
    pictures.

    Args:
        carried: Schema of the carried columns.
        save_tokens: Whether there is a column `tokens`.

    Returns:
        RESULT_FIELDS, `tokens` if saved, then the carried columns.

    Raises:
        ValueError: A carried column has the name of a result column.
        InputError: A carried column has a type that Parquet cannot hold.
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
    ours = [
        field.with_type(source_type(carried)) if field.name == "source" else field for field in RESULT_FIELDS
    ]
    ours += [TOKENS_FIELD] if save_tokens else []
    # Fields read from Parquet may have field ids, which would then occur twice.
    others = [field.remove_metadata() for field in carried]
    return _as_stored(pa.schema([*ours, *others], metadata=metadata))


def own_name(name: str) -> str:
    """The name that a carried column had in the manifest."""
    own = name.removeprefix(CARRIED_PREFIX)
    return own if own in RESULT_NAMES else name


def first_name(name: str) -> str:
    """The name of a column without CARRIED_PREFIX, however many runs have put it before the name."""
    while name.startswith(CARRIED_PREFIX):
        name = name.removeprefix(CARRIED_PREFIX)
    return name


def source_type(schema: pa.Schema) -> pa.DataType:
    """Type of `source` in the results, from the metadata of the plan or of its carried columns."""
    return NOTED_SOURCE_TYPE if NOTE_MARK in (schema.metadata or {}) else SOURCE_TYPE


def json_columns(schema: pa.Schema) -> frozenset[str]:
    """Names of the columns that hold JSON text by the metadata of a schema. Foreign metadata names none."""
    try:
        names = json.loads((schema.metadata or {}).get(JSON_MARK, b"[]"))
    except (ValueError, RecursionError):
        names = []
    if not isinstance(names, list):
        names = []
    texts = {field.name for field in schema if field.type == pa.string()}
    return frozenset(name for name in names if isinstance(name, str) and name in texts)


def _features(value: bytes) -> dict[str, Any]:
    """Features that a Hugging Face file declares; none if its metadata is malformed."""
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


@functools.cache
def _own_fields() -> tuple[pa.Field, ...]:
    return tuple(result_schema(pa.schema([])))


def lacking(schema: pa.Schema) -> str:
    """Tells what a file of this schema lacks to be a file of results.

    Args:
        schema: Schema of the file.

    Returns:
        The end of a sentence; empty if it may be one.
    """
    for field in _own_fields():
        kinds = (SOURCE_TYPE, NOTED_SOURCE_TYPE) if field.name == "source" else (field.type,)
        if schema.names.count(field.name) != 1 or schema.field(field.name).type not in kinds:
            return f"it has no column {field.name} of type {field.type}"
    return ""
