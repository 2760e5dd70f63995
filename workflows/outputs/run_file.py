"""`run.json`: the configuration of a run, written once and never changed."""

import json
from collections.abc import Mapping
from typing import Any

from wallaroo.model.config import TASKS
from wallaroo.model.errors import InputError
from wallaroo.workflows import storage
from wallaroo.workflows.outputs.layout import RUN_FILE, is_early
from wallaroo.workflows.outputs.schema import FORMAT
from wallaroo.workflows.outputs.values import digest, flat, plain, read_json, shown

MAX_NAMED = 3
"""Most files that a message names of a folder that is no output."""


def find_run(output: str) -> dict[str, Any] | None:
    """Reads `run.json` before anything is written into a folder that may hold other files.

    This costs one request if `run.json` exists. Otherwise it costs a listing that ends at the first files
    that no run has written.

    Args:
        output: Folder that a run is to fill, local or on S3; it may be absent.

    Returns:
        What `read_run` gives; None if the folder is new or empty, or has a plan but no `run.json` yet.

    Raises:
        InputError: The folder holds other files, or a `run.json` that cannot be read.
    """
    document = _read(output)
    if document is None:
        found = storage.find_files(output, lambda name: not is_early(name), MAX_NAMED + 1)
        if found:
            more = " and more" if len(found) > MAX_NAMED else ""
            raise InputError(
                f"{output} is not empty and not the output of a run; it holds "
                f"{', '.join(name[:100] for name in found[:MAX_NAMED])}{more}; give a new or an empty folder."
            )
    return document


def put_run(output: str, fields: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
    """Writes `run.json`, or checks that the existing one is of the same run.

    Args:
        output: Folder of the run, local or on S3.
        fields: Plain JSON values of the options that can change the meaning of a row.
        options: Other options, kept for the reader.

    Raises:
        InputError: The output belongs to another run. The message names each differing key with both values.
    """
    path = storage.join(output, RUN_FILE)
    document = {"format": FORMAT, "config_digest": digest(fields), "config": fields, "options": options or {}}
    if not storage.put_if_absent(path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"):
        check_run(output, read_run(output), fields)


def check_run(output: str, run: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Checks that an output is of the run with these fields.

    Args:
        output: Folder of the run, for messages.
        run: What `read_run` gives.
        fields: Plain JSON values of the options that can change the meaning of a row.

    Raises:
        InputError: Some differ. The message names each with both values.
    """
    stored, here = flat(run["config"]), flat(fields)
    if "weights" in str(stored.get("mode")):
        raise InputError(
            f"the output {output} was made with 8-bit weights (its mode is '{stored['mode']}'), which only "
            f"version 0.1.0 had: resume it with that version, or give another output folder."
        )
    differing = [key for key in sorted({*stored, *here}) if plain(stored.get(key)) != plain(here.get(key))]
    if differing:
        words = "; ".join(
            f"{key} is {shown(stored, key)} in the output and {shown(here, key)} in this run"
            for key in differing
        )
        raise InputError(
            f"the output {output} belongs to another run: {words}; "
            f"give another output folder, or the values of the output."
        )


def read_run(output: str) -> dict[str, Any]:
    """Reads `run.json`.

    Args:
        output: Folder of the run, local or on S3.

    Returns:
        `format`, `config_digest`, `config` and `options`.

    Raises:
        InputError: The folder has no `run.json`, so it is no output, or the file cannot be read.
    """
    document = _read(output)
    if document is None:
        stored = next(iter(storage.find_files(output, lambda name: True, 1)), None)
        why = f"it has no {RUN_FILE}" if stored else "there is no such folder, or it is empty"
        raise InputError(f"{output} is not the output of a run, since {why}: give the folder of an output.")
    return document


def _read(output: str) -> dict[str, Any] | None:
    path = storage.join(output, RUN_FILE)
    try:
        document = read_json(path, "restore it, or give another output folder")
    except FileNotFoundError:
        return None
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
