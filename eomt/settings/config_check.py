"""A configuration is checked against the signatures it will be called with, before anything is built."""

import functools
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from eomt.command_line import did_you_mean


def check_config(node: Any, path: str = "") -> None:
    """Walks a plain nested configuration and checks every mapping that names a `_target_`.

    Raises:
        ValueError: a target that does not exist, a key that it does not take, or a value of the wrong type.
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            check_call(node, path)
        for key, value in node.items():
            check_config(value, f"{path}.{key}" if path else str(key))


def check_call(node: Mapping[str, Any], path: str) -> None:
    """One `_target_` and its arguments."""
    try:
        target = pkgutil.resolve_name(node["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}._target_ {node['_target_']!r} cannot be imported: {error}") from error
    hints, open_ended = argument_types(target)
    for key, value in node.items():
        if key.startswith("_") and key.endswith("_"):
            continue
        if key not in hints and not open_ended:
            raise ValueError(f"{path}.{key} is unknown{did_you_mean(key, hints)}")
        if key in hints and not (isinstance(value, Mapping) and "_target_" in value):
            check_type(value, hints[key], f"{path}.{key}")


def argument_types(target: Callable) -> tuple[dict[str, Any], bool]:
    """Type of every argument by name, and whether it takes any others as well (`**kwargs` without a TypedDict).

    A class with a `settings_type` takes that dataclass's fields, too, and so do its subclasses.
    """
    if not hasattr(target, "settings_type"):
        return signature_types(target.__init__ if inspect.isclass(target) else target)
    types = typing.get_type_hints(target.settings_type)
    for base in target.__mro__:
        if hasattr(base, "settings_type") and "__init__" in vars(base):
            types |= signature_types(base.__init__)[0]
    return types, False


def signature_types(function: Callable) -> tuple[dict[str, Any], bool]:
    """`argument_types` of a function, from its signature alone."""
    function = inspect.unwrap(function)
    parameters = inspect.signature(function).parameters
    arguments = {name: hint for name, hint in inspect.get_annotations(function).items() if name != "return"}
    try:
        hints = typing.get_type_hints(SimpleNamespace(__annotations__=arguments), getattr(function, "__globals__", {}))
    except (NameError, TypeError):  # a library's annotations that only its own type checker can read
        hints = {}
    types, open_ended = {}, False
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = typing.get_args(hints.get(name))
            open_ended = not options
            if options:  # Unpack[TypedDict]
                types |= typing.get_type_hints(options[0])
        elif parameter.kind is not parameter.VAR_POSITIONAL and name != "self":
            types[name] = hints.get(name, Any)
    return types, open_ended


def check_type(value: Any, hint: Any, path: str) -> None:
    """Raises ValueError naming path, value and the wanted type when the value is not of the type, exactly."""
    try:
        adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        details = error.errors()
        wanted = " or ".join(dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in details))
        if any(detail["type"] == "string_type" and isinstance(detail["input"], float) for detail in details):
            wanted += '; put it in quotes, ["0016E5"], because YAML reads 0016E5 as a number'
        raise ValueError(f"{path} {value!r}: should be {wanted}") from error
    except PydanticUserError:  # a type only its library knows, which checks it itself
        return


@functools.cache
def adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
