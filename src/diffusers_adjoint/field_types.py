"""Check the values of a dataclass against its annotations, which Python does not do."""

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
    """Check the fields that a class declares, and the inherited fields that are numbers, against their annotations.

    An int is accepted as a float; a bool is not accepted as a number. NumPy numbers are replaced by Python numbers, so that the
    fields can be written as JSON.

    Args:
        values: an instance of the dataclass `declared_by`.
        declared_by: the class whose own fields are checked.
        unchecked: names of fields that are not checked.

    Raises:
        TypeError: for the first field with a value of the wrong type.
        ValueError: for an int that is too large for a float.
    """
    hints, own = typing.get_type_hints(declared_by), declared_by.__annotations__
    for name in (name for name in hints if name in vars(values) and name not in unchecked):
        value = _of_python(vars(values)[name])
        setattr(values, name, value)
        _require_float_range(name, value)
        if _is_checked(value, set(_choices(hints[name])), name in own) and not _fits(value, hints[name]):
            raise TypeError(f"{name}={value!r} is {_kind(value)}; pass {_described(hints[name])}.")


def _of_python(value: Any) -> Any:
    """`value` with NumPy numbers replaced by Python numbers, also in a list."""
    if isinstance(value, list):
        return [_of_python(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _require_float_range(name: str, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > sys.float_info.max:  # the message does not show its hundreds of digits
            raise ValueError(f"{name} has a whole number larger than any float; pass one below {sys.float_info.max:.1e}.")


def _is_checked(value: Any, choices: set[Any], own: bool) -> bool:
    """Whether to check a field: our own, and the host's numbers. The host's other annotations do not match what it accepts."""
    return own or choices <= NUMBERS or (isinstance(value, str) and choices <= NUMBERS | {bool})


def _fits(value: Any, hint: Any) -> bool:
    choices = _choices(hint)
    if len(choices) > 1:
        return any(_fits(value, choice) for choice in choices)
    origin = typing.get_origin(hint) or hint
    if origin in (Any, Literal):  # the config checks the choices of a Literal itself
        return True
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return isinstance(value, origin)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(value: Any) -> str:
    """The type of a value in words, with the types of the items of a list."""
    inside = " of " + ", ".join(sorted({type(item).__name__ for item in value})) if isinstance(value, list) and value else ""
    return f"of type {type(value).__name__}{inside}"


def _described(hint: Any) -> str:
    choices = _choices(hint)
    if len(choices) > 1:
        return " or ".join(map(_described, choices))
    if typing.get_origin(hint) is list:
        return f"a list of {'numbers' if typing.get_args(hint)[0] in NUMBERS else 'texts'}"
    return WORDS.get(hint) or f"a {hint.__name__}"
