"""Descriptions of the flags that craft-ds adds to LeRobot's, read from the configuration classes."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from craft_ds.config.configs import RunOptions


@dataclass(frozen=True)
class FlagDescription:
    """One flag.

    Attributes:
        flag: Name with dashes, such as `--craft.enabled`.
        type: Name of the type, or the choices joined by `|`.
        choices: Allowed values; empty: any value of the type.
        default: Default value as it is written on the command line.
        line: First sentence of the field's documentation.
        text: The field's full documentation, on one line.
    """

    flag: str
    type: str
    choices: tuple[str, ...]
    default: str
    line: str
    text: str


@dataclass(frozen=True)
class FlagGroup:
    """The flags of one configuration class.

    Attributes:
        title: First line of the class documentation.
        prefix: Common start of the flags, such as `--craft.`; `--` for those without a group.
        flags: The flags in the order of the fields.
    """

    title: str
    prefix: str
    flags: tuple[FlagDescription, ...]


def describe_flags() -> list[FlagGroup]:
    """Describe every flag of craft-ds, without importing torch or LeRobot."""
    return list(_groups(RunOptions, "--"))


def _groups(config: type, prefix: str) -> Iterator[FlagGroup]:
    documents, types = field_documents(config), get_type_hints(config)
    nested = {entry.name: types[entry.name] for entry in fields(config) if is_dataclass(types[entry.name])}
    flags = tuple(
        _describe(f"{prefix}{entry.name}", entry, types[entry.name], documents.get(entry.name, ""))
        for entry in fields(config)
        if entry.init and entry.name not in nested
    )
    yield FlagGroup((config.__doc__ or "").split("\n")[0], prefix, flags)
    for name, inner in nested.items():
        yield from _groups(inner, f"{prefix}{name}.")


def _describe(flag: str, entry: Field[Any], kind: Any, text: str) -> FlagDescription:
    choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
    if kind is bool:
        choices = ("true", "false")
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    shown = "|".join(choices) or (
        kind.__name__
        if isinstance(kind, type) and not get_args(kind)
        else re.sub(r"\w+\.", "", str(kind))  # without modules
    )
    return FlagDescription(flag, shown, choices, _on_command_line(default), first_sentence(text), text)


def _on_command_line(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop or semicolon that ends a clause."""
    return re.split(r"(?<=[^.])\. (?=[A-Z`(])", text, maxsplit=1)[0].rstrip(".")


def field_documents(config: type) -> dict[str, str]:
    """Return the documentation of each field: the string literal that follows it in the source."""
    (definition,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    documents = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            documents[before.target.id] = " ".join(str(after.value.value).split())
    return documents
