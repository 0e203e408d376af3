"""Values of a dataclass against its annotations, which Python itself never compares."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

__all__ = ["require_types"]

NUMBERS = {bool, int, float, types.NoneType}
WORDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}


def require_types(values: Any, declared_by: type, unchecked: Collection[str] = ()) -> None:
    """Compare the fields that a class declares with their annotations, and the inherited ones where text stands for a number.

    A whole number is a number; a bool is none. Numbers of NumPy become Python's, as JSON has no others.

    Args:
        values: an instance of the dataclass `declared_by`.
        unchecked: names of fields that are left alone.

    Raises:
        TypeError: for the first field that does not fit.
    """
    hints, own = typing.get_type_hints(declared_by), declared_by.__annotations__
    for name in (name for name in hints if name in vars(values) and name not in unchecked):
        value = vars(values)[name]
        if isinstance(value, np.generic):
            value = value.item()
            setattr(values, name, value)
        # Annotations of the host are wider or narrower than what it takes, except that a text is no number.
        checked = name in own or (isinstance(value, str) and set(_choices(hints[name])) <= NUMBERS)
        if checked and not _fits(value, hints[name]):
            raise TypeError(f"{name}={value!r} is {_kind(value)}; pass {_described(hints[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    choices = _choices(hint)
    if len(choices) > 1:
        return any(_fits(value, choice) for choice in choices)
    origin = typing.get_origin(hint) or hint
    if origin in (Any, Literal):  # which of a few words it is, is checked with them
        return True
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
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
