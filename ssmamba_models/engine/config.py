"""Hyper-parameters: a dataclass in Python, YAML on disk, `--set KEY=VALUE` on the command line; checked in each."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeVar

from ssmamba_models.notice import one_line
from ssmamba_models.output import whole_file


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=Dataclass)

# A configuration is what a person can read; aliases within aliases (YAML's bomb) are not.
_MOST_VALUES = 100_000


def load_config(
    cls: type[Config], path: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Make a config from a file and from values that go before it.

    Args:
        cls: a dataclass.
        path: a YAML file of its keys, such as RUN/config.yaml; None starts from the defaults.
        overrides: key -> value; "method_args.cell_size" reaches into a mapping.

    Returns:
        The config.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        ValueError: it is no YAML mapping, or a key is unknown or missing, or a value has the wrong type or is out of
            its range; the message names it.
        ImportError: PyYAML is missing.
    """
    values = {} if path is None else _read_mapping(Path(path))
    known = {field.name for field in dataclasses.fields(cls)}
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    check_keys(values, known, f"in {str(path)!r}" if path is not None else "among the options")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise ValueError(f"{', '.join(missing)} must be given: on the command line ({options}) or in the --config file")
    return cls(**values)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write a config as YAML, every key with its value, whole or not at all."""
    yaml = _yaml()
    with whole_file(path, overwrite=True) as part:
        part.write_text(yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def config_values(config: Any) -> dict[str, Any]:
    """The keys and values of a config in YAML's own types (tuples become lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def read_yaml(path: str | os.PathLike, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, or refers to itself, or has more values than a person could read.
        ImportError: PyYAML is missing.
    """
    yaml = _yaml()
    text = Path(path).read_bytes()
    try:
        values = yaml.safe_load(text.decode("utf-8"))
        # Such values can be neither compared nor saved.
        _check_size(values)
    # PyYAML raises much else than YAMLError: of "2001-99-99", "[[[[..." or "!!timestamp x".
    except Exception as error:
        raise ValueError(f"{what} {os.fspath(path)!r} is not YAML ({one_line(error)})") from error
    return values


def parse_setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value as in a YAML file.

    Raises:
        ValueError: there is no "=", or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--set {text!r} is not KEY=VALUE, such as --set weight_decay=0.1")
    yaml = _yaml()
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of --set {text!r} is not YAML; quote it, or see the examples in --help") from error


def check_types(config: Any) -> None:
    """Give every field of a dataclass its declared type, or say which cannot have it.

    An int passes for a float, "1e-4" (which YAML takes for text) too, and a list for a tuple.

    Raises:
        ValueError: a field has another type; named, with what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = convert(field.name, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check numbers against (least, most), both allowed; None is not checked.

    Raises:
        ValueError: one is outside; named.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            bounds = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
            raise ValueError(f"{name} is {value}, expected {bounds}")


def complete_arguments(
    key: str, function: Callable, given: Mapping[str, Any], bound: Collection[str] = ()
) -> dict[str, Any]:
    """All arguments of a class or function that a user may choose, with their values, checked by its signature.

    Args:
        key: the config's key that holds them, for messages.
        function: what is going to be called.
        given: those that the user chose.
        bound: names that the caller fills in itself.

    Raises:
        ValueError: an unknown name, or a value of the wrong type.
    """
    parameters = {
        name: parameter for name, parameter in inspect.signature(function).parameters.items() if name not in bound
    }
    check_keys(given, set(parameters), f"in {key}")
    owner = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(owner)
    values = {name: given.get(name, parameter.default) for name, parameter in parameters.items()}
    return {name: _plain(convert(f"{key}.{name}", value, hints.get(name, Any))) for name, value in values.items()}


def check_keys(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse unknown keys, naming the nearest known one."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"unknown key {key!r} {where}; {hint}")


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value as its type hint asks, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(name, value, arguments)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list, Sequence):
        return _convert_sequence(name, value, hint, arguments)
    return _convert_scalar(name, value, origin or hint)


def _convert_union(name: str, value: Any, arguments: tuple) -> Any:
    if value is None and type(None) in arguments:
        return None
    others = [argument for argument in arguments if argument is not type(None)]
    for argument in others[:-1]:
        try:
            return convert(name, value, argument)
        except ValueError:
            continue
    return convert(name, value, others[-1])


def _convert_sequence(name: str, value: Any, hint: Any, arguments: tuple) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} is {value!r}, expected a list")
    fixed = typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise ValueError(f"{name} is {list(value)!r}, expected {len(arguments)} values")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return tuple(convert(f"{name}[{i}]", item, kind) for i, (item, kind) in enumerate(zip(value, kinds)))


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def _convert_scalar(name: str, value: Any, kind: type) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    # A bool is an int in Python, and no number for a person.
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{name} is {value!r}, expected {_KINDS.get(kind, kind.__name__)}")


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    head, dot, rest = key.partition(".")
    if not dot:
        values[key] = value
        return
    inner = values.get(head)
    values[head] = dict(inner) if isinstance(inner, Mapping) else {}
    _override(values[head], rest, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read_mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"the configuration {str(file)!r} does not exist (or is a folder)")
    values = read_yaml(file, "the configuration")
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"the configuration {str(file)!r} holds a {kind}, expected `key: value` lines")
    return values


def _check_size(values: Any) -> None:
    todo, count = [values], 0
    while todo:
        value = todo.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values, or an alias (*) that refers to itself")
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend(value)


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('configurations need PyYAML; pip install "ssmamba-models[train]"') from error
    return yaml
