"""Arguments that a user chose for a class of a registry: known ones, of the right type."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch


def check_arguments(what: str, cls: type, given: Mapping[str, Any], bound: Collection[str]) -> None:
    """Make sure that a class has such arguments, and that numbers are numbers: YAML and JSON give anything.

    A type is told by the argument's default; one whose default is None may be anything.

    Args:
        what: whose arguments they are, for messages.
        cls: the class.
        given: name -> value.
        bound: names that are filled in elsewhere.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    known = {name: one.default for name, one in inspect.signature(cls).parameters.items() if name not in bound}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{what} has no argument {name!r}; it has: {', '.join(sorted(known))}")
        expected = "a torch.dtype" if name == "dtype" else _EXPECTED.get(type(known[name]))
        if expected is not None and not _fits(value, expected):
            raise ValueError(f"{name} of {what} is {value!r}, expected {expected}")


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _fits(value: Any, expected: str) -> bool:
    if expected == "a torch.dtype":
        return value is None or isinstance(value, torch.dtype)
    if expected == "true or false" or isinstance(value, bool):
        return expected == "true or false" and isinstance(value, bool)
    return isinstance(value, int if expected == "a whole number" else (int, float))
