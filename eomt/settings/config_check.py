"""A configuration is checked against the signatures it will be called with, before anything is built."""

import functools
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from eomt.suggestions import did_you_mean

PROJECT = ("eomt", "lora_config")
LIBRARIES = ("lightning", "torch", "torchmetrics", "hydra")  # whose public classes a configuration may name
# parts of them that compile, start processes, open pickles or read the command line
RUN_CODE = ("torch.distributed", "torch.hub", "torch.jit", "torch.multiprocessing", "torch.package", "torch.utils")
RUN_CODE += ("lightning.fabric.cli", "lightning.pytorch.cli")
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")  # dotted, no part of it private


def check_config(node: Any, path: str = "", any_target: bool = False) -> None:
    """Walks a plain nested configuration and checks every mapping that names a `_target_`.

    Raises:
        ValueError: a target that must not be named or does not exist, a key that it does not take, or a value of the
            wrong type.
    """
    for place, mapping in targets_in(node, path):
        check_call(mapping, place, any_target)


def targets_in(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_` in a plain nested configuration, lists included, with its dotted place."""
    if isinstance(node, Mapping) and "_target_" in node:
        yield path, node
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        yield from targets_in(value, f"{path}.{key}" if path else str(key))


def check_name(name: Any, place: str, any_target: bool = False) -> None:
    """Raises ValueError, before anything is imported, where a configuration must not name this.

    Args:
        name: `module.Class`.
        place: where it stands.
        any_target: whether the user allows names of anybody's.
    """
    if any_target and isinstance(name, str):
        return
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{place} {name!r}: a class is named as module.Class")
    root, last = name.split(".")[0], name.split(".")[-1]
    public = root in LIBRARIES and last[0].isupper() and not _is_inside(name, RUN_CODE)
    if root not in PROJECT and not public:
        raise ValueError(
            f"{place} {name!r}: a configuration names this project or public classes of {', '.join(LIBRARIES)}; for "
            "what is your own, which is imported and called, set allow_any_target=true"
        )


def find_target(name: Any, place: str, any_target: bool = False) -> Any:
    """Imports what a configuration names, if it may; raises ValueError if not, or if there is no such thing."""
    check_name(name, place, any_target)
    try:
        target = _import(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{place} {name!r} cannot be imported: {error}") from error
    if any_target:
        return target
    module = getattr(target, "__module__", None) or ""  # where it was defined, not where it was found
    named_as_its_file = getattr(target, "__name__", None) == module.rpartition(".")[2]  # data sets, wandb_logger
    own = _is_inside(module, PROJECT) and (inspect.isclass(target) or named_as_its_file)
    if not own and not (inspect.isclass(target) and _is_inside(module, LIBRARIES) and not _is_inside(module, RUN_CODE)):
        raise ValueError(
            f"{place} {name!r}: it is no class of {' or '.join(LIBRARIES)}, and no class or data set of this "
            "project; set allow_any_target=true if it is meant"
        )
    return target


def _import(name: str) -> Any:
    """As `pkgutil.resolve_name`, which hides that a module is there and what it imports is not."""
    place, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(place), attribute)
    except ModuleNotFoundError as error:
        if not error.name or not f"{place}.".startswith(f"{error.name}."):
            raise
        return pkgutil.resolve_name(name)  # of a class, or without a module


def _is_inside(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def check_call(node: Mapping[str, Any], path: str, any_target: bool = False) -> None:
    """One `_target_` and its arguments."""
    target = find_target(node["_target_"], f"{path}._target_", any_target)
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
        wanted += ", true or false" * any(detail["type"].startswith("bool") for detail in details)
        if any(detail["type"] == "string_type" and isinstance(detail["input"], float) for detail in details):
            wanted += '; put it in quotes, ["0016E5"], because YAML reads 0016E5 as a number'
        raise ValueError(f"{path} {value!r}: should be {wanted}") from error
    except PydanticUserError:  # a type only its library knows, which checks it itself
        return


@functools.cache
def adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
