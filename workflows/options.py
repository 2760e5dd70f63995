"""What an option is: its key, its values, its help, and whom it serves. `settings` declares those of a run.

Flag, key of a run file, help, checks, digest and the arguments of the Python functions follow from that one
declaration. Imports no library, because the command line reads it for its help.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wallaroo.model.config import TASKS
from wallaroo.model.errors import InputError, did_you_mean

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

MAX_NUMBER = 2**64
"""Beyond it no number means anything, and Python refuses to print one with thousands of digits."""


class OptionError(InputError):
    """An option of the command itself breaks a rule, not what the manifest or the model holds."""


class _Refused(ValueError):
    """Holds the rest of the sentence that begins with the option's name."""


@dataclass(frozen=True)
class Kind:
    """The values that an option may have."""

    metavar: str
    """Placeholder of the value in the help; empty for a switch."""
    rule: str
    """What a value must be, as the end of a sentence."""
    read: Callable[[Any], Any]
    """Reads a value from the text of a flag, from TOML or from Python.

    Accepts its own results too. Raises ValueError if the rule is broken.
    """
    write: Callable[[Any], str] = str
    """Writes a value as text, as a user would type it after the flag."""
    choices: tuple[str, ...] = ()
    """All values, if they can be listed."""


@dataclass(frozen=True)
class Option:
    """One option of a run."""

    default: Any
    """The value if none is given."""
    key: str
    """`section.key`, its name in a run file and after `--set`."""
    kind: Kind
    """The values it may have."""
    help: str
    """What it does, for the help. The default is added."""
    tasks: tuple[str, ...] = TASKS
    """The tasks that have it."""
    meaning: bool = False
    """Whether it may change what a row holds, beyond rounding.

    Such options are part of an output's `config_digest`.
    """
    later: bool = False
    """Whether it was added after version 0.1.0.

    `run.json` has it last, and `config_digest` has it only where it is given, so that older outputs keep
    theirs.
    """
    before: Any = None
    """With `later`: the value that outputs of versions without the option were made with.

    An output that lacks the option is resumed with it, also if a preset sets another value by now. None, if
    such an output is refused where the option is given.
    """
    at_start: Callable[[Any], Any] | None = None
    """Chooses the value for a new output that gives none, from its RunConfig.

    An output that has the option is then resumed with the value it was begun with, unless one is given.
    """
    run_only: bool = False
    """Whether the Python functions, which have no output folder, lack it."""
    stored: str = ""
    """Its place in `run.json`, with a dot for a key within a key."""
    name: str = ""
    """Name of the field of RunConfig."""

    @property
    def section(self) -> str:
        """The section of its key."""
        return self.key.partition(".")[0]

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def help_text(self) -> str:
        """The help with the default, where it is a plain value."""
        if self.default is None or isinstance(self.default, bool) or not self.kind.metavar:
            return self.help
        return f"{self.help.removesuffix('.')} (default {self.kind.write(self.default)})."

    def serves(self, task: str) -> bool:
        """Whether a task has this option."""
        return task in self.tasks

    def read(self, value: Any, origin: str = "") -> Any:
        """The value of the option, from text, TOML or Python.

        Args:
            value: What was given.
            origin: What to call the option in an error, such as its flag; its name by default.

        Returns:
            The value.

        Raises:
            OptionError: The value breaks the rule of its kind.
        """
        origin = origin or self.name
        try:
            return self.kind.read(value)
        except _Refused as error:
            raise OptionError(f"{origin} {error}") from None
        except (ValueError, TypeError, OverflowError):
            hint = did_you_mean(str(value), self.kind.choices) if isinstance(value, str) else ""
            raise OptionError(
                f"{origin} is {_shown(value)}, but must be {self.kind.rule}{hint or '.'}"
            ) from None


def option(default: Any, key: str, kind: Kind, help: str, **others: Any) -> Any:
    """Declares a field of a dataclass that is an option.

    Args:
        default: The value if none is given.
        key: `section.key`, its name in a run file and after `--set`.
        kind: The values it may have.
        help: What it does, for the help.
        **others: Other fields of Option.

    Returns:
        The field.
    """
    return dataclasses.field(default=default, metadata={"option": Option(default, key, kind, help, **others)})


def options_of(config: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name, in its order."""
    found = {}
    for one in dataclasses.fields(config):
        if "option" in one.metadata:
            given: Option = one.metadata["option"]
            found[one.name] = dataclasses.replace(given, name=one.name, stored=given.stored or one.name)
    return found


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def whole(least: int, most: int = INT32_MAX, metavar: str = "N", note: str = "") -> Kind:
    """The values of an option that is a whole number.

    Args:
        least: The least value.
        most: The greatest value.
        metavar: Placeholder of the value in the help.
        note: Added to the rule.

    Returns:
        The kind.
    """

    def read(value: Any) -> int:
        number = _integer(value)
        if not least <= number <= most:
            raise ValueError
        return number

    upper = {INT32_MAX: "2^31 - 1", INT64_MAX: "2^63 - 1"}.get(most, str(most))
    return Kind(metavar, f"a whole number from {least} to {upper}{note}", read)


def number(rule: str, holds: Callable[[float], bool] = math.isfinite, metavar: str = "X") -> Kind:
    """The values of an option that is a finite number.

    Args:
        rule: What a value must be, as the end of a sentence.
        holds: Whether a number keeps the rule.
        metavar: Placeholder of the value in the help.

    Returns:
        The kind.
    """

    def read(value: Any) -> float:
        number = _number(value)
        if not (math.isfinite(number) and holds(number)):
            raise ValueError
        return number

    return Kind(metavar, rule, read, "{:g}".format)


def text(metavar: str) -> Kind:
    """A text that is not blank."""
    return Kind(metavar, "a text that is not empty", _text)


def place(metavar: str) -> Kind:
    """A path or an address."""

    def read(value: Any) -> str:
        check_place(_text(value, "rename the folder."))
        return value

    return Kind(metavar, "a text that is not empty", read)


def choice(*choices: str) -> Kind:
    """One of some words."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return value

    return Kind("|".join(choices), f"one of {', '.join(choices)}", read, choices=choices)


def check_place(value: str) -> None:
    """Checks a path or address for what none may hold: a NUL, a user or a password.

    Raises:
        ValueError: It holds one; the message is the rest of a sentence.
    """
    if "\0" in value:
        raise _Refused("holds a NUL character: remove it.")
    # The value would stand in run.json and in messages, so this one does not repeat it.
    if "@" in value.partition("://")[2].partition("/")[0]:
        raise _Refused(
            "holds a user or password, which no address of a run may: "
            "credentials come from the AWS variables or a profile, a token from RAY_AUTH_TOKEN."
        )


def _integer(value: Any) -> int:
    if isinstance(value, str):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_NUMBER:
        return value
    raise ValueError


def _number(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _text(value: Any, remedy: str = "check the encoding of the terminal or script.") -> str:
    if isinstance(value, str) and value.strip():
        if "\0" in value:
            raise _Refused("holds a NUL character: remove it.")
        if re.search("[\ud800-\udfff]", value):
            shown = ascii(value.encode(errors="surrogateescape"))[2:-1][:60]
            raise _Refused(f"is {shown}, which is not UTF-8: {remedy}")
        return value
    raise ValueError


def _switch(value: Any) -> bool:
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    raise ValueError


def _seconds(value: Any) -> float:
    """Seconds of `90`, `90s`, `30m`, `6h`, `2d` or a sum such as `1h30m`."""
    if isinstance(value, str) and (parts := re.findall(r"([0-9.]+)([smhd])", value)):
        if "".join(map("".join, parts)) != value:
            raise ValueError
        seconds = sum(float(count) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for count, unit in parts)
    else:
        seconds = _number(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError
    return seconds


def _range(value: Any) -> tuple[int, int]:
    if isinstance(value, str) and ":" in value:
        value = value.split(":")
    least, most = map(_integer, value) if isinstance(value, list | tuple) else (_integer(value),) * 2
    if not 1 <= least <= most:
        raise ValueError
    return least, most


def _interval(value: Any) -> tuple[float, float]:
    if isinstance(value, str):
        value = value.split(":")
    elif not isinstance(value, list | tuple):
        raise ValueError
    first, last = map(_number, value)
    if not 0 <= first < last <= 1:
        raise ValueError
    return first, last


SWITCH = Kind("", "true or false", _switch)
SECONDS = Kind("TIME", "a time of at least 0 s, such as 90s, 30m, 6h or 1h30m", _seconds, "{:g}s".format)
RANGE = Kind(
    "N|MIN:MAX",
    "a whole number from 1, or MIN:MAX with 1 <= MIN <= MAX",
    _range,
    lambda pair: f"{pair[0]}" if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}",
)
INTERVAL = Kind(
    "START:END",
    "START:END with 0 <= START < END <= 1, such as 0:0.5",
    _interval,
    lambda pair: f"{pair[0]:g}:{pair[1]:g}",
)
