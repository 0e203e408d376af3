"""Values of a dataclass against its annotations, which Python itself never compares."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

__all__ = ["require_types"]

NUMBERS = {int, float, types.NoneType}
WORDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}


def require_types(values: Any, declared_by: type, unchecked: Collection[str] = ()) -> None:
    """Compare the fields that a class declares with their annotations, and those inherited ones that are numbers.

    A whole number is a number; a bool is none. Numbers of NumPy become Python's, as JSON has no others.

    Args:
        values: an instance of the dataclass `declared_by`.
        unchecked: names of fields that are left alone.

    Raises:
        TypeError: for the first field that does not fit.
        ValueError: for a whole number beyond all floats, which no arithmetic with floats takes.
    """
    hints, own = typing.get_type_hints(declared_by), declared_by.__annotations__
    for name in (name for name in hints if name in vars(values) and name not in unchecked):
        value = _of_python(vars(values)[name])
        setattr(values, name, value)
        _require_float_range(name, value)
        if _is_checked(value, set(_choices(hints[name])), name in own) and not _fits(value, hints[name]):
            raise TypeError(f"{name}={value!r} is {_kind(value)}; pass {_described(hints[name])}.")


def _of_python(value: Any) -> Any:
    """The same with Python's numbers in place of NumPy's, in a list too."""
    if isinstance(value, list):
        return [_of_python(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _require_float_range(name: str, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > sys.float_info.max:  # not shown: it has hundreds of digits
            raise ValueError(f"{name} has a whole number larger than any float; pass one below {sys.float_info.max:.1e}.")


def _is_checked(value: Any, choices: set[Any], own: bool) -> bool:
    """Other annotations of the host are wider or narrower than what it takes, except that a text is no bool."""
    return own or choices <= NUMBERS or (isinstance(value, str) and choices <= NUMBERS | {bool})


def _fits(value: Any, hint: Any) -> bool:
    choices = _choices(hint)
    if len(choices) > 1:
        return any(_fits(value, choice) for choice in choices)
    origin = typing.get_origin(hint) or hint
    if origin in (Any, Literal):  # which of a few words it is, is checked with them
        return True
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return isinstance(value, origin)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the one itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(value: Any) -> str:
    """The type of a value, in a list with those of its items."""
    inside = " of " + ", ".join(sorted({type(item).__name__ for item in value})) if isinstance(value, list) and value else ""
    return f"of type {type(value).__name__}{inside}"


def _described(hint: Any) -> str:
    choices = _choices(hint)
    if len(choices) > 1:
        return " or ".join(map(_described, choices))
    if typing.get_origin(hint) is list:
        return f"a list of {'numbers' if typing.get_args(hint)[0] in NUMBERS else 'texts'}"
    return WORDS.get(hint) or f"a {hint.__name__}"
