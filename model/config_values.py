"""Values of a JSON object as fields of dataclasses, by the types that these declare.

Knows nothing of what the values mean.
"""

import dataclasses
import math
import typing
from typing import Any

from wallaroo.model.errors import InputError, did_you_mean

LARGEST = 2**24
"""Maximum integer, far above any real configuration. Broken or hostile files may exceed it."""


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """Makes a dataclass of a JSON object.

    Args:
        cls: The dataclass. A field is a number, a text, a switch, a tuple or dict of these, or a dataclass.
        values: The object; a field that it lacks has its default.
        where: How an error names the object.

    Returns:
        An instance of `cls`.

    Raises:
        InputError: A key is unknown (the message has the nearest known one), or a value is of another type.
    """
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"{where}: unknown key '{name}'{did_you_mean(name, hints) or '.'}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {name} must be an object, not {value!r:.100}.")
            made[name] = build(hints[name], value, f"{where}: {name}")
        else:
            made[name] = _convert(value, hints[name], f"{where}: {name}")
    return cls(**made)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the type that the field is declared with; InputError if it is another."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_convert(item, inner[0], where) for item in value)
        if len(value) == len(inner):
            return tuple(_convert(item, kind, where) for item, kind in zip(value, inner, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: _convert(item, inner[1], f"{where}: {key}") for key, item in value.items()}
    elif hint is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and value > 0:
            return float(value)
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise InputError(f"{where} is {value!r:.100}, but must be {_in_words(hint)}.")


def _in_words(hint: Any) -> str:
    """What a value of this type must be, as the end of a sentence."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a list of {'' if inner[-1] is Ellipsis else f'{len(inner)} times '}{_in_words(inner[0])}"
    if typing.get_origin(hint) is dict:
        return f"an object whose values are each {_in_words(inner[1])}"
    return {
        int: f"a whole number from 0 to {LARGEST}",
        float: "a positive number",
        str: "a text",
        bool: "true or false",
    }[hint]
