"""What enters and leaves a replica: the rows of one shard as one Arrow IPC buffer.

Ray Data may split or join blocks but never a row, so a whole shard travels as one Ray row, its
tables as bytes. Knows nothing of plans and results: a request is named by its position in its shard.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from wallaroo.model.config import Size
from wallaroo.model.prompts import Prompt

# The engine imports torch, which code that only makes requests or reads outcomes does not need.
if TYPE_CHECKING:
    from wallaroo.model.engine.requests import Request, Result

_PROMPT = pa.struct(
    [
        ("ids", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.int32())),
        ("next_position", pa.int32()),
        ("semantic", pa.list_(pa.int32())),
        ("pixel", pa.list_(pa.int32())),
    ]
)
_PICTURE = pa.struct([("height", pa.int32()), ("width", pa.int32()), ("data", pa.binary())])

REQUESTS = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("prompt", _PROMPT, nullable=False),
        pa.field("null", _PROMPT),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("cfg", pa.float64(), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("top_p", pa.float64(), nullable=False),
        pa.field("semantic", _PICTURE),
        pa.field("pixels", _PICTURE),
        pa.field("max_new_tokens", pa.int32(), nullable=False),
    ]
)
"""Requests of one shard. `row` is the position in the shard; positions are (3, L) in row-major order."""

OUTCOMES = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("error_type", pa.string(), nullable=False),
        pa.field("error_message", pa.string(), nullable=False),
        pa.field("picture", _PICTURE),
        pa.field("file", _PICTURE),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("started_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
"""The outcomes of the requests of one shard, each exactly once; `error_type` is empty for an ok row. A
picture is in `picture` as its pixels or in `file` as an encoded file."""


class PictureFile(NamedTuple):
    """An encoded picture."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    data: bytes
    """Bytes of the file."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request."""

    row: int
    """Position of the row in the shard."""
    started_at: datetime
    """When the engine got the request, with a time zone."""
    seconds: float
    """Time from then to the result."""
    error_type: str = ""
    """Kind of the error; empty for an ok row."""
    error_message: str = ""
    """What is wrong; empty for an ok row."""
    pixels: np.ndarray | None = None
    """uint8 [H, W, 3]; None for a text, an error row, and where `file` is set."""
    tokens: np.ndarray | None = None
    """int32 `(n,)`."""
    finish_reason: str = ""
    """Why an answer ended: `stop` or `length`; empty for a picture."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    file: PictureFile | None = None
    """The picture, if the replica encoded it."""

    @classmethod
    def of_result(cls, row: int, result: "Result", started_at: datetime, seconds: float) -> "Outcome":
        """The outcome of a row that the engine returned.

        Args:
            row: Position of the row in the shard.
            result: The result of the engine.
            started_at: When the engine got the request, with a time zone.
            seconds: Time from then to the result.

        Returns:
            The outcome.
        """
        return cls(
            row=row,
            error_type="engine" if result.error else "",
            error_message=result.error,
            pixels=None if result.error else result.pixels,
            tokens=result.tokens,
            finish_reason=result.finish_reason,
            prompt_tokens=result.prompt_tokens,
            started_at=started_at,
            seconds=seconds,
        )


def to_ipc(table: pa.Table) -> bytes:
    """The table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes) -> pa.Table:
    """The table of `to_ipc`; its columns are views of `data` where Arrow can do so."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all()


def request_values(
    row: int,
    prompt: Prompt,
    null: Prompt | None,
    size: Size | None,
    seed: int,
    sampling: Mapping[str, float],
    semantic: np.ndarray | None = None,
    pixels: np.ndarray | None = None,
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """One row of a table under REQUESTS; the values are those of `model.engine.Request`.

    Args:
        row: Position of the row in the shard.
        prompt: The prompt.
        null: The prompt of the null branch; None without guidance.
        size: Of the picture to generate; None for a text.
        seed: Of the draws.
        sampling: `cfg`, `temperature`, `top_k` and `top_p`.
        semantic: Source for the vision tower, uint8 [H, W, 3], or None.
        pixels: Source for the image tokenizer, uint8 [H, W, 3], or None.
        max_new_tokens: Most tokens of a text.

    Returns:
        Name of the column -> value.
    """
    return {
        "row": row,
        "prompt": _prompt_values(prompt),
        "null": None if null is None else _prompt_values(null),
        "height": None if size is None else size.height,
        "width": None if size is None else size.width,
        "seed": seed,
        **{name: sampling[name] for name in ("cfg", "temperature", "top_k", "top_p")},
        "semantic": _picture_values(semantic),
        "pixels": _picture_values(pixels),
        "max_new_tokens": max_new_tokens,
    }


def requests_table(values: Iterable[Mapping[str, Any]]) -> pa.Table:
    """One row of each of `request_values`, under REQUESTS."""
    return pa.Table.from_pylist(list(values), REQUESTS)


def requests(table: pa.Table, keys: Sequence[Hashable]) -> list["Request"]:
    """Reads the requests of a table.

    Args:
        table: Rows under REQUESTS.
        keys: A key for each row, by which the engine names its result.

    Returns:
        One request per row.
    """
    from wallaroo.model.engine.requests import Request
    from wallaroo.model.sampling import Sampling

    made = []
    for key, values in zip(keys, table.to_pylist(), strict=True):
        height, width = values["height"], values["width"]
        made.append(
            Request(
                key=key,
                prompt=_prompt(values["prompt"]),
                null=None if values["null"] is None else _prompt(values["null"]),
                size=None if height is None else Size(height, width),
                seed=values["seed"],
                sampling=Sampling(
                    cfg=values["cfg"],
                    temperature=values["temperature"],
                    top_k=values["top_k"],
                    top_p=values["top_p"],
                ),
                semantic=_picture(values["semantic"]),
                pixels=_picture(values["pixels"]),
                max_new_tokens=values["max_new_tokens"],
            )
        )
    return made


def outcomes_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """One row an outcome, under OUTCOMES."""
    return pa.Table.from_pylist(
        [
            {
                "row": outcome.row,
                "error_type": outcome.error_type,
                "error_message": outcome.error_message,
                "picture": _picture_values(outcome.pixels),
                "file": None if outcome.file is None else outcome.file._asdict(),
                "tokens": () if outcome.tokens is None else outcome.tokens,
                "finish_reason": outcome.finish_reason,
                "prompt_tokens": outcome.prompt_tokens,
                "started_at": outcome.started_at,
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        ],
        OUTCOMES,
    )


def outcomes(table: pa.Table) -> list[Outcome]:
    """The outcomes of a table under OUTCOMES; the pixels are views of the table's memory."""
    return [
        Outcome(
            row=values["row"],
            error_type=values["error_type"],
            error_message=values["error_message"],
            pixels=_picture(values["picture"]),
            file=None if values["file"] is None else PictureFile(**values["file"]),
            tokens=np.asarray(values["tokens"], np.int32),
            finish_reason=values["finish_reason"],
            prompt_tokens=values["prompt_tokens"],
            started_at=values["started_at"],
            seconds=values["seconds"],
        )
        for values in table.to_pylist()
    ]


def _prompt_values(prompt: Prompt) -> dict[str, Any]:
    return {
        "ids": prompt.ids,
        "positions": prompt.positions.reshape(-1),
        "next_position": prompt.next_position,
        "semantic": prompt.semantic,
        "pixel": prompt.pixel,
    }


def _prompt(values: dict[str, Any]) -> Prompt:
    return Prompt(
        ids=np.asarray(values["ids"], np.int32),
        positions=np.asarray(values["positions"], np.int32).reshape(3, -1),
        next_position=values["next_position"],
        semantic=None if values["semantic"] is None else tuple(values["semantic"]),
        pixel=None if values["pixel"] is None else np.asarray(values["pixel"], np.int32),
    )


def _picture_values(pixels: np.ndarray | None) -> dict[str, Any] | None:
    if pixels is None:
        return None
    height, width, _ = pixels.shape
    return {"height": height, "width": width, "data": pixels.tobytes()}


def _picture(values: dict[str, Any] | None) -> np.ndarray | None:
    if values is None:
        return None
    return np.frombuffer(values["data"], np.uint8).reshape(values["height"], values["width"], 3)
