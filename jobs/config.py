"""The run configuration: flags over `--set` over a TOML run file over defaults, as one RunConfig.

Knows nothing of how a run uses a value. Options, their values and rules are declared in `workflows.settings`.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows.options import Option
from wallaroo.workflows.settings import OPTIONS, REMOVED, RunConfig

SECTIONS = {
    "run": "Run",
    "prompt": "Prompts",
    "sampling": "Sampling (for rows that set none)",
    "source": "Source images",
    "image": "Images",
    "cluster": "Resources",
}
"""Section of a run file -> heading of its options in the help, in the help's order."""

MAX_RUN_FILE_BYTES = 1 << 20

_BY_KEY = {one.key: one for one in OPTIONS.values()}


def resolve(
    task: str,
    manifest: str,
    output: str,
    flags: Mapping[str, Any],
    assignments: Iterable[str] = (),
    file: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> RunConfig:
    """The configuration of a run.

    Args:
        task: `generate`, `edit` or `understand`.
        manifest: A path, folder or glob, local or on S3.
        output: The folder of the results.
        flags: Option name -> text or switch of its flag; None where it was not given.
        assignments: The `section.key=value` of every `--set`; a later one wins.
        file: Local path or `s3://` of a TOML run file.
        environment: Has RAY_ADDRESS, the default of `address`.

    Returns:
        The configuration.

    Raises:
        InputError: A section or key does not exist (the nearest one is named), or a value breaks a rule.
    """
    values: dict[str, Any] = {}
    if environment.get("RAY_ADDRESS"):
        values["address"] = environment["RAY_ADDRESS"]
    if file is not None:
        for one, value in _read_file(file):
            values[one.name] = one.read(value, f"{one.key} in {file}")
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or "." not in key:
            raise InputError(f"--set {assignment} must read section.key=value, such as sampling.cfg=4.")
        section, _, inner = key.strip().partition(".")
        one = _option(section, inner, "--set")
        values[one.name] = one.read(value.strip(), f"--set {one.key}")
    for name, value in flags.items():
        if value is not None:
            values[name] = OPTIONS[name].read(value, OPTIONS[name].flag)
    return RunConfig(manifest, output, task, **values)


def _option(section: str, key: str, where: str) -> Option:
    """The option of this section and key. where: what to call their place in an error."""
    if section not in SECTIONS:
        hint = did_you_mean(section, SECTIONS) or f"; sections are {', '.join(SECTIONS)}."
        raise InputError(f"{where}: unknown section '{section}'{hint}")
    name = f"{section}.{key}"
    if name in REMOVED:
        raise InputError(f"{where}: {name} {REMOVED[name]}")
    if name not in _BY_KEY:
        keys = [one.key.partition(".")[2] for one in OPTIONS.values() if one.section == section]
        elsewhere = [other for other in _BY_KEY if other.endswith(f".{key}")]
        nearest = f"; did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, keys)
        hint = nearest or f"; it has {', '.join(keys)}."
        raise InputError(f"{where}: unknown key '{key}' in section {section}{hint}")
    return _BY_KEY[name]


def _read_file(path: str) -> list[tuple[Option, Any]]:
    """The options of a run file with their values. Raises InputError if it cannot be read."""
    from wallaroo.workflows.storage import info, read_bytes

    found = info(path)
    if found is not None and found.size > MAX_RUN_FILE_BYTES:
        raise InputError(
            f"{path} has {found.size:,} bytes, but a run file has at most {MAX_RUN_FILE_BYTES:,}: "
            f"give a TOML file of options."
        )
    try:
        tables = tomllib.loads(read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no run file {path}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8, but a run file must be: save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is not valid TOML: it is nested too deeply or has too large a number."
        ) from None
    values = []
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(
                f"{path}: '{section}' is outside of a section; sections are {', '.join(SECTIONS)}."
            )
        if section not in SECTIONS:
            _option(section, "", path)
        values += [(_option(section, key, path), value) for key, value in table.items()]
    return values
