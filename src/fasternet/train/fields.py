"""Reads and checks the fields of a dataclass by their annotations.

An annotation is ``int``, ``float``, ``bool``, ``str``, a ``Literal`` of texts, a tuple of two floats, or
one of these ``| None``.
"""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text that is not empty",
    types.NoneType: "none",
}


def parse_value(text: str, hint: Any) -> Any:
    """Read a value from text: ``3``, ``1e-3``, ``true``, ``none``, ``0.3,1`` ...

    Raises:
        ValueError: The text is no such value; the message goes on from the name of the field.
    """
    for member in _members(hint):
        try:
            value = _parse_member(text, member)
        except ValueError:
            continue
        if has_type(value, member):
            return value
    raise ValueError(f"must be {describe_type(hint)}")


def has_type(value: object, hint: Any) -> bool:
    """Tell whether a value is what an annotation says; a whole number is a float too, nan is none, text not empty."""
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            fits = value in typing.get_args(member)
        elif typing.get_origin(member) is tuple:
            fits = isinstance(value, tuple) and len(value) == 2 and all(has_type(part, float) for part in value)
        elif member is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else:
            fits = type(value) is member and value != ""
        if fits:
            return True
    return False


def describe_type(hint: Any) -> str:
    """Return what an annotation allows, in words."""
    parts: list[str] = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            parts += typing.get_args(member)
        else:
            parts.append(_WORDS.get(member, "two numbers with a comma between"))
    return " or ".join(parts)


def _members(hint: Any) -> list[Any]:
    """Return the members of a union, None first, or the annotation alone."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return sorted(members, key=lambda member: member is not types.NoneType)


def _parse_member(text: str, member: Any) -> Any:
    words = {"none": None, "true": True, "false": False}
    if member in (types.NoneType, bool):
        return words.get(text.lower(), text)
    if typing.get_origin(member) is tuple:
        return tuple(float(part) for part in text.split(","))
    return member(text) if member in (int, float) else text
