"""Rows of `data/`, from planned rows and their outcomes: files of pictures, texts, digests."""

import dataclasses
import hashlib
import importlib.metadata
import io
import platform
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from wallaroo.model.config import MAX_NEW_TOKENS
from wallaroo.workflows.outputs.schema import MIME_TYPES, RESULT_NAMES, TEXT_TASKS
from wallaroo.workflows.outputs.values import digest
from wallaroo.workflows.outputs.xmp import embed, xmp_packet
from wallaroo.workflows.tasks import EXACT

if TYPE_CHECKING:
    from wallaroo.actors.rows import Outcome


def restore_size(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales the result of an edit to the size of its source.

    One factor scales the picture until it covers that size, and the overhang is cut off evenly on both sides.
    So nothing is distorted and no border is added. The model saw the middle of the source. So result and
    source differ by a margin of a few per cent, if the table of sizes has one near the source's ratio. A
    source far longer than any size of the table loses much more.

    Args:
        pixels: uint8 [H, W, 3], the result.
        height: Height of the source in pixels.
        width: Width of the source in pixels.

    Returns:
        uint8 [height, width, 3].
    """
    image = Image.fromarray(pixels)
    scale = max(height / image.height, width / image.width)
    # Cut first: a whole picture that covers 20000x100 pixels would take hundreds of megabytes.
    top = max(0.0, (image.height - height / scale) / 2)
    left = max(0.0, (image.width - width / scale) / 2)
    box = (left, top, image.width - left, image.height - top)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def environment(device: str, threads: int, shapes: Mapping[str, int | str]) -> dict[str, Any]:
    """Describes what may change a picture by rounding only. Every row holds the digest of it.

    Args:
        device: Model name of the GPU, or `cpu`.
        threads: CPU threads of the engine.
        shapes: Sizes at which the operators run, such as rows of a group or tokens of a chunk.

    Returns:
        Values for JSON, with the versions of the packages.
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


@dataclass(frozen=True)
class RunConstants:
    """What is the same in every row of a run."""

    task: str
    """`generate`, `edit` or `understand`."""
    model_digest: str
    """Digest of the checkpoint, hexadecimal."""
    config_digest: str
    """Digest of the configuration of the run, hexadecimal."""
    mode: str = EXACT
    """Names lossy shortcuts; EXACT without any."""
    image_format: str = "png"
    """`png`, `webp` or `jpeg`."""
    image_quality: int | None = None
    """`quality` of `encode_image`."""
    png_compression: str | None = None
    """`png_compression` of `encode_image`."""
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Language -> prompt template that replaces the built-in one."""
    restore_size: bool = False
    """Whether a picture gets the size of its source."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Most tokens of a text."""
    min_pixels: int | None = None
    """Fewest pixels of a picture to understand; None for the limit of the checkpoint."""
    max_pixels: int | None = None
    """Most pixels of a picture to understand; None for the limit of the checkpoint."""
    embed_metadata: bool = False
    """Whether picture files hold XMP metadata."""


@dataclass(frozen=True)
class Producer:
    """The replica and environment that made the rows of a shard."""

    replica: str = ""
    """Name of the replica for people."""
    environment_digest: str = ""
    """Digest of its `environment`, hexadecimal."""
    attempts: int = 1
    """How many attempts it took."""


def encode_image(
    pixels: np.ndarray, image_format: str, quality: int | None = None, png_compression: str | None = None
) -> tuple[bytes, str]:
    """Encodes pixels as an image file. Equal pixels give equal bytes.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        image_format: `png`, `webp` or `jpeg`.
        quality: 1 to 100. `webp` is lossless if it is None. `jpeg` takes 95 if it is None, and keeps colours
            at full resolution. `png` ignores it.
        png_compression: `fast` or `small`. None means `small`, as in outputs of older versions.

    Returns:
        The file and its MIME type.

    Raises:
        ValueError: The pixels have another type or shape, or the format is unknown.
    """
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3]")
    options: dict[str, Any]
    if image_format == "png":
        # Photographs of 512x512 pixels: 18 ms and 417 KB by run lengths alone, 21 ms and 439 KB at level 1,
        # 69 ms and 404 KB at level 6 (Pillow 13). PNG's filters leave few repeats that are worth a search.
        fast = png_compression == "fast"
        options = {"compress_level": 1, "compress_type": zlib.Z_RLE} if fast else {"compress_level": 6}
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
    """Names the picture of a row inside the data set by its number, never by text of a user.

    Args:
        row_id: Number of the row.
        image_format: `png`, `webp` or `jpeg`.

    Returns:
        A file name such as `row-00000012.png`.
    """
    return f"row-{row_id:08d}.{'jpg' if image_format == 'jpeg' else image_format}"


def build_result_table(
    plan: pa.Table,
    outcomes: Iterable["Outcome"],
    run: RunConstants,
    made: Producer,
    schema: pa.Schema,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> pa.Table:
    """Builds the rows of one shard as they will stand in `data/`, in the order of the plan.

    Args:
        plan: Planned rows of the shard with their carried columns. For tasks that read pictures it has the
            column `source`. The load stage fills in what it learns: `sha256`, `width` and
            `height` of `source`, and error rows of kind `image`.
        outcomes: One of every row that the plan does not refuse, in any order.
        run: What is the same in every row of the run.
        made: Who made these rows.
        schema: Schema of the result, from `result_schema`.
        decode: Token ids -> text; required if the results are texts.

    Returns:
        The rows in that schema.

    Raises:
        ValueError: A row has no outcome or an outcome no row, since none may be lost on the way. Or an
            outcome does not fit the task.
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
    made: Producer,
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
    if outcome.tokens is None or (outcome.pixels is None and outcome.file is None) != textual:
        raise ValueError(f"row {row['row_id']} is ok, but has no {'text' if textual else 'image'}")
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
        file: tuple[int, int, bytes] | None = outcome.file
        if file is None:
            assert outcome.pixels is not None
            file = picture_file(outcome.pixels, run, row.get("source"))
        row |= _picture_values(row, file, run)
    return row | {"content_digest": _content_digest(row, run)}


def picture_file(
    pixels: np.ndarray, run: RunConstants, source: Mapping[str, Any] | None
) -> tuple[int, int, bytes]:
    """Encodes a picture as it will stand in the data set, without metadata.

    Args:
        pixels: uint8 [H, W, 3].
        run: Says format, quality and whether the picture gets the size of its source.
        source: `height` and `width` of the source in pixels; None for a picture without one.

    Returns:
        Height and width in pixels, and the bytes of the file.
    """
    if run.restore_size:
        assert source is not None
        pixels = restore_size(pixels, source["height"], source["width"])
    encoded, _ = encode_image(pixels, run.image_format, run.image_quality, run.png_compression)
    return pixels.shape[0], pixels.shape[1], encoded


def _picture_values(
    row: Mapping[str, Any], file: tuple[int, int, bytes], run: RunConstants
) -> dict[str, Any]:
    """Columns of a result that is a picture, from what `picture_file` made."""
    height, width, encoded = file
    if run.embed_metadata:
        encoded = embed(encoded, xmp_packet(row["prompt"] or "", str(row["seed"]), run.model_digest))
    return {
        "image": {"bytes": encoded, "path": image_path(row["row_id"], run.image_format)},
        "mime_type": MIME_TYPES[run.image_format],
        "height": height,
        "width": width,
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }


def _text_values(text: str) -> dict[str, Any]:
    """Columns of a result that is a text. It has no size; `sha256` is that of its UTF-8 bytes."""
    return {"text": text, "height": None, "width": None, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _content_digest(row: Mapping[str, Any], run: RunConstants) -> str:
    """Digest of all that determines a result, and of nothing that only names or places it.

    Rows of two runs with one digest hold the same result, up to the rounding of their environments.
    """
    named = ("task", "mode", "model_digest", "prompt", "language", "width", "height", "seed")
    fields = {name: row[name] for name in (*named, "cfg", "temperature", "top_k", "top_p")}
    if run.task in TEXT_TASKS:
        fields["max_new_tokens"] = run.max_new_tokens
    else:
        fields |= {"image_format": run.image_format, "image_quality": run.image_quality}
        # Absent where it is false, so that rows of older versions keep their digest.
        fields |= {"embed_metadata": True} if run.embed_metadata else {}
    fields["source"] = (row.get("source") or {}).get("sha256")
    fields["template"] = run.templates.get(row["language"] or "")
    return digest(fields)
