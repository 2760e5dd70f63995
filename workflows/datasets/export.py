"""Results in the formats of other tools: folders of pictures, WebDataset, benchmarks' trees, JSON lines.

An export reads the shards of a finished run one after the other and writes files that follow from them
alone, each whole or absent; so it may be cut off, and given again it leaves what is there already as it
is. Error rows have nothing to export and are only counted. Knows nothing of Ray, and of pictures only
what a format asks for.
"""

import base64
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows import storage
from wallaroo.workflows.datasets.export_files import MARK, Results, Row, Sink, file_stem, place
from wallaroo.workflows.datasets.xmp import embed, xmp_packet
from wallaroo.workflows.outputs.rows import encode_image
from wallaroo.workflows.outputs.schema import MIME_TYPES, RESULT_NAMES
from wallaroo.workflows.outputs.values import json_line, jsonable
from wallaroo.workflows.settings import OptionError

SUFFIXES = {MIME_TYPES["png"]: "png", MIME_TYPES["webp"]: "webp", MIME_TYPES["jpeg"]: "jpg"}

GRID = 4
"""Pictures of a grid: two rows of two."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    what: an ok row gives. exported: ok rows that are in DEST now. errors: error rows, which are not.
    left_out: ok rows that the format has no place for, and why. unchanged: files, among `files`, that were
    there as they should be. renamed: rows whose id made no safe file name.
    """

    dest: str
    what: str
    exported: int
    errors: int
    left_out: int
    why: str
    files: int
    unchanged: int
    renamed: int

    def text(self) -> str:
        """The summary as a sentence or a few."""
        parts = [
            f"{_number(self.exported, self.what)} exported to {self.dest}, {_number(self.files, 'file')}"
        ]
        if self.unchanged:
            parts[0] += f" of which {self.unchanged:,} there already"
        if self.errors:
            parts.append(f"{_number(self.errors, 'error row')} with nothing to export")
        if self.left_out:
            parts.append(f"{_number(self.left_out, 'ok row')} left out, since {self.why}")
        if self.renamed:
            parts.append(f"{_number(self.renamed, 'name')} with a hash, since the id is no safe file name")
        return "; ".join(parts) + "."


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def export(
    output: str,
    dest: str,
    form: str,
    *,
    embed_metadata: bool = False,
    image_urls: str | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Writes the ok rows of a finished run to the folder `dest` in a format of FORMATS.

    output, dest: local or `s3://`. embed_metadata: write prompt, seed, model digest and IPTC's digital
    source type into every picture file, whose pixels stay as they are. image_urls: for `openai-batch`,
    write pictures as files to `dest`/images, and into the lines their URLs below this one, instead of
    base64. Only files of the export's own names are written, and none is removed. overwrite: replace files
    that have other content, and write beside files that no export of this format makes.
    Raises OptionError for a format or option that does not exist, InputError if the output is not
    finished, is of another task than the format, or cannot be read, and without overwrite if DEST holds
    such files.
    """
    if form not in FORMATS:
        hint = did_you_mean(form, FORMATS) or "."
        raise OptionError(f"format is '{form}', but must be one of {', '.join(FORMATS)}{hint}")
    if image_urls is not None and form != "openai-batch":
        raise OptionError(f"image_urls is for openai-batch, but format is '{form}': leave it out.")
    if embed_metadata and form == "jsonl":
        raise OptionError("embed_metadata is for pictures, but format 'jsonl' has none: leave it out.")
    chosen = FORMATS[form]
    results = Results(output)
    if results.task not in chosen.tasks:
        fit = ", ".join(name for name, one in FORMATS.items() if results.task in one.tasks)
        raise InputError(
            f"format '{form}' is for {' and '.join(chosen.tasks)}, but {output} is of {results.task}: "
            f"choose one of {fit}."
        )
    _refuse_inside(output, dest)
    if not overwrite:
        _refuse_foreign(dest, form)
    count = _Count()
    with Sink(dest, overwrite) as sink:
        chosen.write(results, sink, count, _Options(embed_metadata, image_urls))
    return ExportSummary(
        dest,
        chosen.what,
        count.exported,
        results.errors,
        count.left_out,
        chosen.why,
        sink.files,
        sink.unchanged,
        count.renamed,
    )


def _refuse_inside(output: str, dest: str) -> None:
    if storage.is_s3(output) != storage.is_s3(dest):
        return
    ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (output, dest)]
    folder, inner = (path.rstrip("/") + "/" for path in ends)
    if inner.startswith(folder):
        raise InputError(f"DEST {dest} lies in {output}, whose files are the run's: choose another place.")


def _refuse_foreign(dest: str, form: str) -> None:
    names = re.compile(FORMATS[form].names)
    found = storage.find_files(dest, lambda name: not names.fullmatch(name), 1)
    if found:
        raise InputError(
            f"{dest} holds {found[0]:.100}, which no export of the format '{form}' writes: "
            f"choose another DEST, or --overwrite to write beside it."
        )


class _Options(NamedTuple):
    embed: bool
    image_urls: str | None


@dataclass
class _Count:
    exported: int = 0
    left_out: int = 0
    renamed: int = 0


# Rows


_FACTS = (
    "id",
    "sample",
    "row_id",
    "task",
    "prompt",
    "width",
    "height",
    "sha256",
    "seed",
    "cfg",
    "temperature",
    "top_k",
    "top_p",
    "language",
    "mode",
    "model_digest",
)
_ANSWER_FACTS = (
    "row_id",
    "finish_reason",
    "prompt_tokens",
    "output_tokens",
    "language",
    "seed",
    "mode",
    "model_digest",
)
_SOURCE_FACTS = ("source_uri", "source_sha256", "source_row_id")


def _source_facts(row: Row) -> dict[str, Any]:
    """Where the picture came from that a row started with; nothing for a task without one."""
    if row.values["task"] == "generate":
        return {}
    source = row.values["source"] or {}
    return {name: source.get(name.removeprefix("source_")) for name in _SOURCE_FACTS}


def _picture_facts(row: Row) -> dict[str, Any]:
    return {name: jsonable(row.values[name]) for name in _FACTS} | _source_facts(row)


def _stem(row: Row, count: _Count, dots: bool = True, samples: bool = True) -> str:
    """The stem of a row's files: of its id, and of the number of its sample where there are several."""
    row_id, version, sample = place(row.values)
    stem = file_stem(row_id, dots)
    count.renamed += stem != row_id
    if version:
        stem += f"{MARK}v{version}"
    if samples and (row.follows or row.followed):
        stem += f"{MARK}{sample}"
    return stem


# Pictures


def _packet(*rows: Row) -> bytes:
    first = rows[0].values
    seeds = " ".join(str(row.values["seed"]) for row in rows)
    return xmp_packet(first["prompt"] or "", seeds, first["model_digest"])


def _bytes(row: Row) -> bytes:
    if row.picture is None:
        raise InputError(f"row_id {row.values['row_id']} is ok, but has no picture: verify the output.")
    return row.picture


def _picture(row: Row, options: _Options, png: bool = False) -> bytes:
    """The file of a row's picture; its very bytes, unless it must be PNG and is not, or get metadata."""
    data = _bytes(row)
    if png and row.values["mime_type"] != MIME_TYPES["png"]:
        data = encode_image(_pixels(row), "png")[0]
    return embed(data, _packet(row)) if options.embed else data


def _pixels(row: Row) -> np.ndarray:
    """uint8 [height, width, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(_bytes(row))) as image:
        return np.asarray(image.convert("RGB"))


def _memory(row: Row) -> int:
    """Bytes that it takes to make another file of a row's picture: two files, and the pixels."""
    return 2 * len(_bytes(row)) + 3 * row.values["width"] * row.values["height"]


def _grid(rows: list[Row], options: _Options) -> bytes:
    """Four pictures of one size as one PNG: the first two above the others."""
    pixels = [_pixels(row) for row in rows]
    grid = np.concatenate([np.concatenate(pixels[:2], axis=1), np.concatenate(pixels[2:], axis=1)])
    data = encode_image(grid, "png")[0]
    return embed(data, _packet(*rows)) if options.embed else data


# Formats


def _files(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """Pictures by id, and `metadata.jsonl` as Hugging Face's imagefolder wants it."""
    with sink.stream("metadata.jsonl") as lines:
        for row in filter(lambda row: row.ok, results.rows()):
            name = f"{_stem(row, count)}.{SUFFIXES[row.values['mime_type']]}"
            data = _picture(row, options)
            sink.put(name, functools.partial(bytes, data), len(data))
            facts = {"file_name": name} | _picture_facts(row)
            if options.embed:
                facts["sha256"] = hashlib.sha256(data).hexdigest()
            lines.write(json_line(facts | results.carried_values(row, facts, _no_file_name, text=True)))
            count.exported += 1


def _no_file_name(name: str) -> str:
    """imagefolder opens what a column of such a name says."""
    return f"{name}_text" if re.search(r"(^|_)file_names?$", name) else name


def _webdataset(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """A tar a shard: for every row its picture, its prompt as `txt` and the rest as `json`.

    A shard without a picture gives an empty tar, so that the numbers have no gaps.
    """
    for shard, rows in itertools.groupby(results.rows(), key=lambda row: row.values["shard"]):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in filter(lambda row: row.ok, rows):
                # Readers take what follows the first dot for the suffix.
                stem = _stem(row, count, dots=False)
                facts = _picture_facts(row)
                facts |= results.carried_values(row, facts)
                for suffix, data in (
                    (SUFFIXES[row.values["mime_type"]], _picture(row, options)),
                    ("txt", (row.values["prompt"] or "").encode()),
                    ("json", json_line(facts)),
                ):
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                count.exported += 1
        data = buffer.getvalue()
        sink.put(f"shard-{shard:08d}.tar", functools.partial(bytes, data), len(data))


def _geneval(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """A folder a prompt, numbered as in the manifest, with the prompt's metadata and its samples."""
    if "tag" not in results.schema.names:
        raise InputError(
            f"GenEval's evaluator reads the tag of every prompt, but {results.output} has no column 'tag': "
            f"generate from GenEval's evaluation_metadata.jsonl."
        )
    described = -1
    for row in filter(lambda row: row.ok, results.rows()):
        folder = f"{row.number:05d}"
        if row.number != described:
            described = row.number
            # A column that a line lacked is null here, and the evaluator would trip over a null.
            metadata = results.carried_values(row, ("prompt",), _own_name)
            metadata = {name: value for name, value in metadata.items() if value is not None}
            line = json_line(metadata | {"prompt": row.values["prompt"]})
            sink.put(f"{folder}/metadata.jsonl", functools.partial(bytes, line), len(line))
        name = f"{folder}/samples/{row.values['sample']:04d}.png"
        sink.put(name, functools.partial(_picture, row, options, png=True), _memory(row))
        count.exported += 1


def _own_name(name: str) -> str:
    """The name that a carried column had in the manifest."""
    own = name.removeprefix("in_")
    return own if own in RESULT_NAMES else name


def _dpg(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """A PNG a prompt, named by its id, with its first four samples in two rows of two."""

    def finish(group: list[Row], ok: int) -> None:
        sizes = {(row.values["width"], row.values["height"]) for row in group}
        square = len(sizes) == 1 and all(width == height for width, height in sizes)
        used = GRID if square and [row.values["sample"] for row in group] == list(range(GRID)) else 0
        if used:
            # The evaluator takes what precedes the first dot for the id.
            name = f"{_stem(group[0], count, dots=False, samples=False)}.png"
            sink.put(name, functools.partial(_grid, group, options), 2 * sum(map(_memory, group)))
        count.exported += used
        count.left_out += ok - used

    group: list[Row] = []
    ok = 0
    for row in results.rows():
        if not row.follows:
            finish(group, ok)
            group, ok = [], 0
        ok += row.ok
        if row.ok and row.values["sample"] < GRID:
            group.append(row)
    finish(group, ok)


def _imgedit(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """A PNG a key, which is the row's id."""
    for row in filter(lambda row: row.ok, results.rows()):
        if row.values["sample"]:
            count.left_out += 1
            continue
        name = f"{_stem(row, count, samples=False)}.png"
        sink.put(name, functools.partial(_picture, row, options, png=True), _memory(row))
        count.exported += 1


def _jsonl(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """`answers.jsonl`: question and answer of every row, and what they are about."""
    with sink.stream("answers.jsonl") as lines:
        for row in filter(lambda row: row.ok, results.rows(pictures=False)):
            values = row.values
            facts = {
                "id": values["id"],
                "sample": values["sample"],
                "question": values["prompt"],
                "answer": values["text"],
            }
            facts |= _source_facts(row) | {name: jsonable(values[name]) for name in _ANSWER_FACTS}
            lines.write(json_line(facts | results.carried_values(row, facts)))
            count.exported += 1


def _openai_batch(results: Results, sink: Sink, count: _Count, options: _Options) -> None:
    """`results.jsonl`: a line a request in the shape of OpenAI's batch API, its body that of the images API.

    A request of which samples failed has an `error`, and a `response` only if others did not fail. Lines
    are written piece by piece: one may hold thousands of pictures.
    """
    with sink.stream("results.jsonl") as lines:
        made, failed = 0, 0
        error: dict[str, str] | None = None
        for row in results.rows():
            if row.ok:
                lines.write(b", " if made else _line_to_data(row))
                lines.write(json.dumps(_datum(row, sink, count, options)).encode())
                made += 1
                count.exported += 1
            else:
                code, message = row.values["error_type"], row.values["error_message"]
                error = error or {"code": code, "message": message}
                failed += 1
            if row.followed:
                continue
            if error and made + failed > 1:
                error["message"] = f"{failed} of {made + failed} pictures failed: {error['message']}"
            if made:
                lines.write(b"]}}, " + json_line({"error": error})[1:])
            else:
                lines.write(json_line(_request(row) | {"response": None, "error": error}))
            made, failed, error = 0, 0, None


def _request(row: Row) -> dict[str, str]:
    """How a line begins."""
    row_id, version, _ = place(row.values)
    number = hashlib.sha256(f"{version} {row_id}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return {"id": f"batch_req_{number}", "custom_id": row_id}


def _line_to_data(row: Row) -> bytes:
    """A line with a response, up to where its first picture stands."""
    values, request = row.values, _request(row)
    body = {
        "created": int(values["started_at"].timestamp()) if values["started_at"] else 0,
        "size": f"{values['width']}x{values['height']}",
        "output_format": values["mime_type"].removeprefix("image/"),
        "data": [],
    }
    response = {"status_code": 200, "request_id": request["id"].removeprefix("batch_"), "body": body}
    return json_line(request | {"response": response}).rstrip().removesuffix(b"]}}}")


def _datum(row: Row, sink: Sink, count: _Count, options: _Options) -> dict[str, str]:
    """A picture in the words of the images API."""
    data = _picture(row, options)
    if options.image_urls is None:
        return {"b64_json": base64.b64encode(data).decode()}
    name = f"images/{_stem(row, count)}.{SUFFIXES[row.values['mime_type']]}"
    sink.put(name, functools.partial(bytes, data), len(data))
    return {"url": f"{options.image_urls.rstrip('/')}/{urllib.parse.quote(name)}"}


class _Format(NamedTuple):
    """write: makes the files. names: pattern of theirs. tasks: whose outputs it is for. what: it holds.
    why: rows are left out."""

    write: Callable[[Results, Sink, _Count, _Options], None]
    names: str
    tasks: tuple[str, ...]
    what: str = "picture"
    why: str = ""


_PICTURE = r"[\w@.-]+\.(png|webp|jpg)"
FORMATS = {
    "files": _Format(_files, rf"metadata\.jsonl|{_PICTURE}", ("generate", "edit")),
    "webdataset": _Format(_webdataset, r"shard-\d{8,}\.tar", ("generate", "edit")),
    "geneval": _Format(_geneval, r"\d{5,}/(metadata\.jsonl|samples/\d{4,}\.png)", ("generate",)),
    "dpg": _Format(
        _dpg, _PICTURE, ("generate",), why="a grid takes four pictures of a prompt, of one square size"
    ),
    "imgedit": _Format(_imgedit, _PICTURE, ("edit",), why="a key has one picture, which is that of sample 0"),
    "jsonl": _Format(_jsonl, r"answers\.jsonl", ("understand",), "answer"),
    "openai-batch": _Format(_openai_batch, rf"results\.jsonl|images/{_PICTURE}", ("generate", "edit")),
}
"""Every format by its name on the command line."""
