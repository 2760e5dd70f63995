"""Results in the formats of other tools: folders of pictures, WebDataset, benchmarks' trees, JSON lines.

An export reads the shards of a run in order, and its files depend on them alone. Files are written
atomically. So an export may be interrupted; when re-run it leaves finished files alone. Error rows are only
counted. Knows nothing of Ray, and of pictures only what a format needs.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows import storage
from wallaroo.workflows.datasets import export_benchmarks
from wallaroo.workflows.datasets.content_credentials import CredentialSigner
from wallaroo.workflows.datasets.export_batch import openai_batch
from wallaroo.workflows.datasets.export_files import Results, Row
from wallaroo.workflows.datasets.export_rows import (
    SUFFIXES,
    Count,
    Exporter,
    Options,
    picture_facts,
    picture_of,
    source_facts,
    stem_of,
)
from wallaroo.workflows.datasets.export_signed import signed_pictures
from wallaroo.workflows.datasets.export_sink import Sink
from wallaroo.workflows.datasets.export_summary import (
    PARTIAL_FILE,
    ExportSummary,
    put_mark,
    read_growing,
    refuse_foreign_mark,
    remove_mark,
)
from wallaroo.workflows.datasets.progress import Report, silent
from wallaroo.workflows.outputs.schema import TEXT_TASKS
from wallaroo.workflows.outputs.values import json_line, jsonable
from wallaroo.workflows.settings import OptionError

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


def export(
    output: str,
    dest: str,
    form: str,
    *,
    embed_metadata: bool = False,
    image_urls: str | None = None,
    c2pa: tuple[str, str] | None = None,
    partial: bool = False,
    overwrite: bool = False,
    on_progress: Report = silent,
) -> ExportSummary:
    """Writes the ok rows of a run in a format of FORMATS.

    Only files of the export's own names are written, and none is removed but the mark of a partial export.

    Args:
        output: The folder of the run, local or `s3://`.
        dest: The folder to write to, local or `s3://`.
        form: Name of the format.
        embed_metadata: Write prompt, seed, model digest and IPTC's digital source type into every picture
            file, whose pixels stay as they are; the files of a run with this option have them anyway.
        image_urls: For `openai-batch`, write pictures as files to `dest`/images, and into the lines their
            URLs below this one, instead of base64.
        c2pa: For `files`, paths of certificate and key as PEM: sign Content Credentials into every picture.
        partial: Export the finished shards of an active or stopped run. `_partial.json` in `dest`
            then says so, until a complete export.
        overwrite: Replace files that have other content, and write beside files that no export of this
            format makes.
        on_progress: Called about twice a second.

    Returns:
        Counts of rows and files.

    Raises:
        OptionError: A format or option does not exist, or is for others.
        InputError: The output is not finished (with `partial`: has no finished shard), is of another task
            than the format, or cannot be read;
            certificate or key cannot sign; without overwrite, DEST holds such files.
    """
    if form not in FORMATS:
        hint = did_you_mean(form, FORMATS) or "."
        raise OptionError(f"format is '{form}', but must be one of {', '.join(FORMATS)}{hint}")
    if image_urls is not None and form != "openai-batch":
        raise OptionError(f"image_urls is for openai-batch, but format is '{form}': leave it out.")
    if embed_metadata and FORMATS[form].what != "image":
        raise OptionError(f"embed_metadata is for images, but format '{form}' has none: leave it out.")
    if c2pa is not None and form != "files":
        raise OptionError(f"c2pa is for the format files, but format is '{form}': leave it out.")
    chosen = FORMATS[form]
    results = Results(output, partial, on_progress)
    if results.task not in chosen.tasks:
        fit = ", ".join(name for name, one in FORMATS.items() if results.task in one.tasks)
        raise InputError(
            f"format '{form}' is for {' and '.join(chosen.tasks)}, but {output} is of {results.task}: "
            f"choose one of {fit}."
        )
    if results.task in TEXT_TASKS and (embed_metadata or image_urls is not None):
        raise OptionError(
            "embed_metadata and image_urls are for images, but the results are texts: leave them out."
        )
    _refuse_inside(output, dest)
    if not overwrite:
        _refuse_foreign(dest, form)
        refuse_foreign_mark(dest)
    signer = CredentialSigner(*c2pa) if c2pa is not None else None
    count = Count()
    growing = read_growing(dest)
    mark = functools.partial(put_mark, dest, results) if results.partial or growing else None
    with Sink(dest, overwrite, mark, growing) as sink:
        chosen.write(results, sink, count, Options(embed_metadata or results.embedded, image_urls, signer))
    if results.partial:
        counts = {"exported": count.exported, "errors": results.errors, "missing_rows": results.missing}
        put_mark(dest, results, {name: (digest,) for name, digest in sink.growing.items()}, **counts)
    else:
        remove_mark(dest)
    return ExportSummary(
        dest,
        "answer" if results.task in TEXT_TASKS else "image",
        count.exported,
        results.errors,
        chosen.failed,
        count.left_out,
        chosen.why,
        sink.files,
        sink.unchanged,
        count.renamed,
        count.misses,
        tuple(count.missed),
        count.unread,
        results.finished_shards,
        len(results.plan.shards),
        results.missing,
        results.plan.complete,
        results.partial,
    )


def _refuse_inside(output: str, dest: str) -> None:
    if storage.is_s3(output) != storage.is_s3(dest):
        return
    ends = [path if storage.is_s3(path) else os.path.realpath(path) for path in (output, dest)]
    folder, inner = (path.rstrip("/") + "/" for path in ends)
    if inner.startswith(folder):
        raise InputError(f"DEST {dest} is inside {output}, where only its run writes: choose another folder.")


def _refuse_foreign(dest: str, form: str) -> None:
    names = re.compile(rf"{PARTIAL_FILE}|{FORMATS[form].names}")
    found = storage.find_files(dest, lambda name: not names.fullmatch(name), 1)
    if found:
        raise InputError(
            f"{dest} holds {found[0]:.100}, which no export of the format '{form}' writes: "
            f"choose another DEST, or --overwrite to write beside it."
        )


# Formats


def _files(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """Pictures by id, and `metadata.jsonl` for Hugging Face's imagefolder."""
    ok = filter(lambda row: row.ok, results.rows())
    named = ((row, f"{stem_of(row, count)}.{SUFFIXES[row.values['mime_type']]}") for row in ok)
    files: Iterator[tuple[Row, str, bytes]]
    if options.signer is None:
        files = ((row, name, picture_of(row, options)) for row, name in named)
    else:
        files = signed_pictures(named, options.signer, sink, count, options)
    with sink.stream("metadata.jsonl") as lines:
        for row, name, data in files:
            sink.put(name, functools.partial(bytes, data), len(data))
            facts = {"file_name": name} | picture_facts(row)
            if options.embed or options.signer is not None:
                facts["sha256"] = hashlib.sha256(data).hexdigest()
            lines.write(json_line(facts | results.carried_values(row, facts, _no_file_name, text=True)))
            count.exported += 1


def _no_file_name(name: str) -> str:
    """Renames a column that imagefolder would treat as the path of a file to open."""
    return f"{name}_text" if re.search(r"(^|_)file_names?$", name) else name


def _webdataset(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """`shard-*.tar`, with keys made of the rows' ids."""
    # Readers take what follows the first dot for the suffix.
    _tars(results, sink, options, "shard-{:08d}.tar", lambda row, *_: stem_of(row, count, dots=False))
    count.exported = results.ok


def _img2dataset(results: Results, sink: Sink, count: Count, options: Options) -> None:
    """`*.tar`, with keys of five digits for the tar and four for the row in it."""
    _tars(results, sink, options, "{:05d}.tar", lambda _, tar, row: f"{tar:05d}{row:04d}", captions=True)
    count.exported = results.ok


def _tars(
    results: Results,
    sink: Sink,
    options: Options,
    name: str,
    key_of: Callable[[Row, int, int], str],
    captions: bool = False,
) -> None:
    """A tar per shard: of every row its picture, its prompt as `txt` and the rest as `json`.

    Hugging Face's loader takes the types of all samples from the first five of the first tar. So each
    `json` has the same keys and types, and a shard without pictures gives no tar; the numbers have no gaps.

    Args:
        name: Format of a tar's name, for its number.
        key_of: Row, numbers of the tar and of the row in it -> stem of its files.
        captions: Write key and prompt into the `json` by the names that img2dataset has for them.
    """

    def facts_of(row: Row, key: str) -> dict[str, Any]:
        facts = {"key": key, "caption": row.values["prompt"] or ""} if captions else {}
        facts |= picture_facts(row)
        return facts | results.carried_values(row, facts, text=True)

    uneven: set[str] = set()
    for row in filter(lambda row: row.ok, results.rows(pictures=False)):
        uneven |= {name for name, value in facts_of(row, "").items() if _typeless(value)}
    results.forget()
    tars = 0
    for _, rows in itertools.groupby(results.rows(), key=lambda row: row.values["shard"]):
        buffer = io.BytesIO()
        inner = 0
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in filter(lambda row: row.ok, rows):
                key = key_of(row, tars, inner)
                facts = {name: _even(value, name in uneven) for name, value in facts_of(row, key).items()}
                for suffix, data in (
                    (SUFFIXES[row.values["mime_type"]], picture_of(row, options)),
                    ("txt", (row.values["prompt"] or "").encode()),
                    ("json", json_line(facts)),
                ):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                inner += 1
        if inner:
            data = buffer.getvalue()
            sink.put(name.format(tars), functools.partial(bytes, data), len(data), grows=True)
            tars += 1


def _typeless(value: Any) -> bool:
    """Whether JSON does not tell this value's type as it tells that of others of its column."""
    return value is None or (isinstance(value, int) and not -(1 << 63) <= value < 1 << 63)


def _even(value: Any, uneven: bool) -> Any:
    """A value in the one type of its column: text where values are nested, or others are absent."""
    if value is None:
        return ""
    nested = isinstance(value, (dict, list))
    return (
        json.dumps(value, ensure_ascii=False) if nested or (uneven and not isinstance(value, str)) else value
    )


def _jsonl(results: Results, sink: Sink, count: Count, options: Options) -> None:
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
            facts |= source_facts(row) | {name: jsonable(values[name]) for name in _ANSWER_FACTS}
            lines.write(json_line(facts | results.carried_values(row, facts)))
            count.exported += 1


class _Format(NamedTuple):
    """A format of `wallaroo export`."""

    write: Exporter
    """Makes its files."""
    names: str
    """Pattern of the names of its files."""
    tasks: tuple[str, ...]
    """Tasks whose outputs it is for."""
    what: str = "image"
    """What it holds, in a word."""
    why: str = ""
    """Why rows are left out, as a part of a sentence; empty if none is."""
    failed: str = "with nothing to export"
    """What it writes of error rows, as a part of a sentence."""


_PICTURE = r"[\w@.-]+\.(png|webp|jpg)"
_EXACT = r"[^/]+\.png"
FORMATS = {
    "files": _Format(_files, rf"metadata\.jsonl|{_PICTURE}", ("generate", "edit")),
    "webdataset": _Format(_webdataset, r"shard-\d{8,}\.tar", ("generate", "edit")),
    "img2dataset": _Format(_img2dataset, r"\d{5,}\.tar", ("generate", "edit")),
    "geneval": _Format(
        export_benchmarks.geneval, r"\d{5,}/(metadata\.jsonl|samples/\d{4,}\.png)", ("generate",)
    ),
    "dpg": _Format(
        export_benchmarks.dpg,
        _EXACT,
        ("generate",),
        why="a grid takes four images of a prompt, of one square size",
    ),
    "dpg-single": _Format(export_benchmarks.dpg_single, rf"\d+/{_EXACT}", ("generate",)),
    "wise": _Format(
        export_benchmarks.wise,
        r"\d+\.png",
        ("generate",),
        why="a prompt has one image, which is that of sample 0",
    ),
    "t2i-compbench": _Format(export_benchmarks.t2i_compbench, rf"samples/{_EXACT}", ("generate",)),
    "gedit": _Format(
        export_benchmarks.gedit,
        rf"fullset/[^/]+/[^/]+/{_EXACT}",
        ("edit",),
        why="a key has one image, which is that of sample 0",
    ),
    "imgedit": _Format(
        export_benchmarks.imgedit,
        _EXACT,
        ("edit",),
        why="a key has one image, which is that of sample 0",
    ),
    "jsonl": _Format(_jsonl, r"answers\.jsonl", ("understand",), "answer"),
    "vlmevalkit": _Format(export_benchmarks.vlmevalkit, r"predictions\.tsv", ("understand",), "answer"),
    "openai-batch": _Format(
        openai_batch,
        rf"results\.jsonl|images/{_PICTURE}",
        ("generate", "edit", "understand"),
        failed="written to results.jsonl as `error`",
    ),
}
"""Every format by its name on the command line."""
