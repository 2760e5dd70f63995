"""Durations, values and errors in words, for people."""


def duration(seconds: float) -> str:
    """Seconds in the one or two units that a person would name: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    for unit, name, lower, lower_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // lower
            return f"{whole // unit} {name} {rest} {lower_name}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"


def rounded(value: float) -> str:
    """A measured number with three digits, and never with an exponent above 1: `0.0334`, `26.3`, `5,020`."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    Args:
        count: The count.
        noun: In the singular; its plural must end in `s`.

    Returns:
        Such as `1 row` or `2,212 rows`.
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: object, most: int | None = None) -> str:
    """The first line of what a library says of an error.

    Args:
        error: The error, or its text.
        most: Most characters; all if None.

    Returns:
        The line.
    """
    return str(error).strip().split("\n", 1)[0][:most]
