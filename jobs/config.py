"""The run configuration: flags over `--set` over a TOML run file over defaults, as one RunConfig.

Every setting is one row of SETTINGS, which makes its flag, its key in a run file and its line in the
help. Knows nothing of how a run uses a value; what a value may be is checked by RunConfig itself.
"""

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wallaroo.model.errors import InputError, did_you_mean
from wallaroo.workflows.tasks import ONLY_FOR, PRESETS, SAMPLING

if TYPE_CHECKING:
    from wallaroo.workflows.settings import RunConfig

SECTIONS = {
    "run": "What to make",
    "prompt": "Prompts",
    "sampling": "Sampling (of rows that do not say)",
    "source": "Source pictures",
    "image": "Pictures",
    "cluster": "Where it runs",
}
"""Section of a run file -> heading of its options in the help, in the help's order."""


MOST = 2**64
"""Beyond it no number means anything, and of one with thousands of digits Python refuses to speak."""

RUN_FILE_BYTES = 1 << 20


def _integer(value: Any) -> int:
    if isinstance(value, str):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST:
        return value
    raise ValueError


def _number(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _switch(value: Any) -> bool:
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    raise ValueError


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError


def _replicas(value: Any) -> tuple[int, int]:
    if isinstance(value, str) and ":" in value:
        least, _, most = value.partition(":")
        return _integer(least), _integer(most)
    return (_integer(value),) * 2


def _seconds(value: Any) -> float:
    """Of `90`, `90s`, `30m`, `6h`, `2d` or a sum such as `1h30m`."""
    if isinstance(value, str) and (parts := re.findall(r"([0-9.]+)([smhd])", value)):
        if "".join(map("".join, parts)) != value:
            raise ValueError
        return sum(float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)
    return _number(value)


def _interval(value: Any) -> tuple[float, float]:
    if isinstance(value, str):
        first, last = value.split(":")
        return float(first), float(last)
    raise ValueError


_RULES: dict[Callable[[Any], Any], str] = {
    _integer: "a whole number",
    _number: "a number",
    _switch: "true or false",
    _text: "a text that is not empty",
    _replicas: "a whole number or MIN:MAX",
    _interval: "START:END, such as 0:0.5",
    _seconds: "a time such as 90s, 30m, 6h or 1h30m",
}


@dataclass(frozen=True)
class Setting:
    """One thing that a run can be told.

    name: `section.key`, as a run file and `--set` have it.
    target: the field of RunConfig that it fills, with a dot for a field within a field.
    read: makes its value from a TOML value or from the text of a flag; ValueError if it cannot.
    metavar: what stands for the value in the help; empty for a switch.
    """

    name: str
    target: str
    read: Callable[[Any], Any]
    metavar: str
    help: str

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    def serves(self, task: str) -> bool:
        """Whether a task can be told it."""
        return task in ONLY_FOR.get(self.target.partition(".")[0], (task,))

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        words = self.target.removeprefix("sampling.").replace("templates.", "template_")
        return "--" + words.replace("_", "-")


# fmt: off
SETTINGS = (
    Setting("run.model", "model", _text, "PATH", "Checkpoint folder, local or s3://, or tiny (default)."),
    Setting("run.weights", "weights", _text, "int8|fp8",
            "Smaller and lossy ones (default: the checkpoint's); needs torchao."),
    Setting("run.samples", "samples", _integer, "N", "Pictures of each prompt (default 1)."),
    Setting("run.seed", "seed", _integer, "N", "Same seed, same pictures (default 0)."),
    Setting("run.preset", "preset", _text, "NAME",
            "Published sampling parameters: geneval, dpg or imgedit; others given here win."),
    Setting("run.limit", "limit", _integer, "N", "Only N manifest rows for now; the whole run reuses them."),
    Setting("run.where", "where", _text, "EXPR", "Only rows for which this SQL expression holds, likewise."),
    Setting("run.incremental", "incremental", _switch, "",
            "MANIFEST grows: make what is new in it, each time."),
    Setting("run.max_error_rate", "max_error_rate", _number, "SHARE",
            "Stop when more of the rows are errors (0.05 is 5 %)."),
    Setting("run.retry_errors", "retry_errors", _switch, "",
            "Make the error rows of OUTPUT once more, but for those that the plan refuses."),
    Setting("run.grace", "grace", _seconds, "TIME",
            "After Ctrl-C, SIGTERM or the deadline: for shards in flight (default 60s)."),
    Setting("run.deadline", "deadline", _seconds, "TIME", "Stop after this time, such as 6h."),
    Setting("run.strict", "strict", _switch, "", "Refuse to go on where rounding may differ."),
    Setting("prompt.text", "prompt", _text, "TEXT", "Instruction or question of rows that do not say."),
    Setting("prompt.column", "prompt_column", _text, "NAME", "Column with the prompts (default prompt)."),
    Setting("prompt.language", "language", _text, "en|zh", "Of the template (default: by the prompt)."),
    Setting("prompt.max_tokens", "max_prompt_tokens", _integer, "N",
            "Longer prompts are error rows, never cut (default 1024)."),
    Setting("prompt.template_en", "templates.en", _text, "TEXT",
            "English template, with {prompt}, {target_w} and {target_h}."),
    Setting("prompt.template_zh", "templates.zh", _text, "TEXT", "Chinese template, likewise."),
    Setting("prompt.max_new_tokens", "max_new_tokens", _integer, "N",
            "Most tokens of an answer (default 256)."),
    Setting("sampling.cfg", "sampling.cfg", _number, "X",
            "Guidance; at most 1 is none (default 3; understand: 1)."),
    Setting("sampling.temperature", "sampling.temperature", _number, "X",
            "0 always takes the likeliest token (default 1)."),
    Setting("sampling.top_k", "sampling.top_k", _integer, "N",
            "Draw from the N likeliest tokens, 0 from all (default 1000; understand: 1)."),
    Setting("sampling.top_p", "sampling.top_p", _number, "P",
            "Draw from the likeliest that sum to P, 1 from all (default 1)."),
    Setting("sampling.cfg_interval", "cfg_interval", _interval, "START:END",
            "Lossy: guide only these steps of a picture, as shares; faster if END is less than 1."),
    Setting("source.root", "image_root", _text, "PATH",
            "Where relative paths of pictures start (default: beside the manifest)."),
    Setting("source.allow_https", "allow_https", _switch, "", "Fetch https:// sources too."),
    Setting("source.max_bytes", "max_source_bytes", _integer, "N",
            "Larger source files are error rows (default 134217728)."),
    Setting("source.max_pixels", "max_source_pixels", _integer, "N",
            "Larger sources are error rows (default 67108864)."),
    Setting("image.restore_size", "restore_size", _switch, "", "Give results the size of their sources."),
    Setting("image.width", "width", _integer, "PIXELS", "With --height: size of rows that do not say."),
    Setting("image.height", "height", _integer, "PIXELS", "Likewise (default: the size nearest to square)."),
    Setting("image.format", "image_format", _text, "FORMAT", "png (default), webp or jpeg."),
    Setting("image.quality", "image_quality", _integer, "1-100", "Of jpeg (default 95); makes webp lossy."),
    Setting("image.save_tokens", "save_tokens", _switch, "", "Also write each picture's token ids."),
    Setting("cluster.replicas", "replicas", _replicas, "N|MIN:MAX", "Model replicas, one a GPU (default 1)."),
    Setting("cluster.slots", "slots", _integer, "N", "Rows a replica decodes at once (default: what fits)."),
    Setting("cluster.device", "device", _text, "DEVICE",
            "auto (default: GPUs if any are up), cpu, or cuda, which waits for them."),
    Setting("cluster.threads", "threads", _integer, "N", "CPU threads of a replica (default 1)."),
    Setting("cluster.address", "address", _text, "ADDRESS",
            "A running Ray cluster (default: $RAY_ADDRESS, or a local Ray)."),
    Setting("cluster.price_per_hour", "price_per_hour", _number, "PRICE",
            "Of one replica; then status and report say what the run cost."),
)
# fmt: on

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def resolve(
    task: str,
    manifest: str,
    output: str,
    flags: Mapping[str, Any],
    assignments: Iterable[str] = (),
    file: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> "RunConfig":
    """The configuration of a run.

    flags: setting name (`sampling.cfg`) -> text or switch of its flag; None where it was not given.
    assignments: the `section.key=value` of every `--set`; a later one wins.
    file: local path or `s3://` of a TOML run file.

    Raises InputError for an unknown section or key, with the nearest right one, for a value that is
    not of its type, and for whatever RunConfig refuses.
    """
    from wallaroo.model.sampling import Sampling
    from wallaroo.workflows.settings import RunConfig

    values: dict[str, Any] = {}
    if environment.get("RAY_ADDRESS"):
        values["cluster.address"] = environment["RAY_ADDRESS"]
    if file is not None:
        for name, value in _read_file(file).items():
            values[name] = _value(_BY_NAME[name], value, f"{name} in {file}")
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or "." not in name:
            raise InputError(f"--set {assignment} must read section.key=value, such as sampling.cfg=4.")
        section, key = name.strip().split(".", 1)
        setting = _known(section, key, "--set")
        values[setting.name] = _value(setting, value.strip(), f"--set {setting.name}")
    for name, value in flags.items():
        if value is not None:
            values[name] = _value(_BY_NAME[name], value, _BY_NAME[name].flag)

    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {"sampling": {}, "templates": {}}
    for name, value in values.items():
        outer, _, inner = _BY_NAME[name].target.partition(".")
        if inner:
            nested[outer][inner] = value
        else:
            fields[outer] = value
    preset = PRESETS.get(fields.get("preset", ""))
    sampling = preset.sampling if preset else SAMPLING.get(task, {})
    return RunConfig(
        manifest=manifest,
        output=output,
        task=task,
        sampling=Sampling(**sampling | nested["sampling"]),
        templates=nested["templates"],
        **fields,
    )


def _value(setting: Setting, value: Any, origin: str) -> Any:
    try:
        return setting.read(value)
    except (ValueError, OverflowError):
        raise InputError(f"{origin} is {_shown(value)}, but must be {_RULES[setting.read]}.") from None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _known(section: str, key: str, where: str) -> Setting:
    if section not in SECTIONS:
        nearest = did_you_mean(section, SECTIONS) or f"; there are {', '.join(SECTIONS)}."
        raise InputError(f"{where}: unknown section '{section}'{nearest}")
    name = f"{section}.{key}"
    if name not in _BY_NAME:
        keys = [setting.name.partition(".")[2] for setting in SETTINGS if setting.section == section]
        elsewhere = [setting.name for setting in SETTINGS if setting.name.endswith(f".{key}")]
        nearest = (
            f"; did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, keys)
        ) or f"; it has {', '.join(keys)}."
        raise InputError(f"{where}: unknown key '{key}' in section {section}{nearest}")
    return _BY_NAME[name]


def _read_file(path: str) -> dict[str, Any]:
    from wallaroo.workflows.storage import info, read_bytes

    found = info(path)
    if found is not None and found.size > RUN_FILE_BYTES:
        raise InputError(f"{path} has {found.size:,} bytes, but a run file has at most {RUN_FILE_BYTES:,}.")
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
            f"{path} is not valid TOML: it is nested too deeply, or has an absurd number."
        ) from None
    values = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(
                f"{path}: '{section}' stands outside of a section; sections are {', '.join(SECTIONS)}."
            )
        if section not in SECTIONS:
            _known(section, "", where=path)
        for key, value in table.items():
            values[_known(section, key, where=path).name] = value
    return values
