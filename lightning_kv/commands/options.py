"""What a command is, and what its options are: read from a dataclass and its docstring."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHORT = {"out": "-o"}

METAVARS = {int: "N", float: "X", Path: "PATH", bool: "", list: "A,B", dict: "NAME"}


@dataclass(frozen=True)
class Command:
    """One command: what it is told, and what it does.

    Args:
        name: What is typed for it.
        options: Dataclass of its options; its docstring is the beginning of ``--help``.
        run: What it does with them; may return an exit code.
        after: The end of ``--help``: what else to know, and examples.
        positional: Options that are typed without their name, in order, and what stands for them.
        metavars: What stands for a value in ``--help``, where its kind does not say it.
        repeated: Options that are typed once for each of their items, and under which name.
    """

    name: str
    options: type
    run: Callable[[Any], int | None]
    after: str
    positional: Mapping[str, str] = field(default_factory=dict)
    metavars: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        key: Dotted name of its field.
        typed: What is typed for it, without dashes.
        kind: Its type.
        default: Its value where it is not given; MISSING where it must be.
        about: What it means.
        metavar: What stands for its value in ``--help``.
    """

    key: str
    typed: str
    kind: Any
    default: Any
    about: str
    metavar: str

    @property
    def label(self) -> str:
        """How errors call it."""
        short = SHORT.get(self.key)
        return f"{short}/--{self.typed}" if short else f"--{self.typed}"

    @property
    def help(self) -> str:
        """Its meaning and default."""
        value, about = self.default, self.about.rstrip(".")
        if value is None or not self.typed:
            text = self.about
        elif value is dataclasses.MISSING:
            text = f"{about} (needed)."
        else:
            text = f"{about} ({shown(value)})."
        return text.replace("%", "%%")


def shown(value: Any) -> str:
    """A value as it is typed.

    >>> shown(True), shown(["a", "b"]), shown("")
    ('true', 'a,b', 'none')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value in ("", {}) else str(value)


def options_of(command: Command) -> list[Option]:
    """All options of a command, those of dataclasses inside with dots."""
    return list(_walk(command, command.options, "", None))


def _walk(command: Command, kind: type, prefix: str, usual: Any) -> Iterable[Option]:
    told, hints = meanings(kind), typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        key, hint = prefix + each.name, hints[each.name]
        default = getattr(usual, each.name) if usual is not None else default_of(each)
        if dataclasses.is_dataclass(hint):
            inside = None if default is dataclasses.MISSING else default
            yield from _walk(command, hint, f"{key}.", inside)
            continue
        yield Option(
            key=key,
            typed="" if key in command.positional else command.repeated.get(key, key),
            kind=hint,
            default=default,
            about=told.get(each.name, ""),
            metavar=command.metavars.get(key) or command.positional.get(key) or metavar_of(hint),
        )


def meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each field."""
    from docstring_parser import parse

    docs = [parse(base.__dict__.get("__doc__") or "") for base in reversed(kind.__mro__)]
    params = [own for doc in docs for own in doc.params]
    return {own.arg_name: " ".join((own.description or "").split()) for own in params}


def default_of(each: dataclasses.Field) -> Any:
    """The default of a field; MISSING where it has none."""
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, None left out."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(x for x in typing.get_args(hint) if x is not type(None)) if union else (hint,)


def listed(hint: Any) -> Any:
    """The type of the items, where ``a,b`` is a list; None where it is not."""
    for kind in kinds_of(hint):
        origin, inside = typing.get_origin(kind), typing.get_args(kind)
        if origin is list or (origin is tuple and inside[-1:] == (...,)):
            return None if dataclasses.is_dataclass(inside[0]) else inside[0]
    return None


def metavar_of(hint: Any) -> str:
    """What stands for a value of a type."""
    if listed(hint):
        return METAVARS[list]
    kind = kinds_of(hint)[0]
    return METAVARS.get(typing.get_origin(kind) or kind, "NAME")


def usage(command: Command, known: Sequence[Option]) -> str:
    """What is typed at least."""
    words = [f"lightning-kv {command.name}"]
    for one in known:
        if one.key in command.positional:
            optional = one.default is not dataclasses.MISSING
            several = " ..." if listed(one.kind) else ""
            words.append(f"[{one.metavar}{several}]" if optional else one.metavar + several)
    needed = [one for one in known if one.typed and one.default is dataclasses.MISSING]
    words += [f"{SHORT.get(one.key, f'--{one.typed}')} {one.metavar}" for one in needed]
    return " ".join([*words, "[--OPTION VALUE ...]"])


def plain(name: str) -> str:
    """A name without leading dashes, and with underscores.

    >>> plain("--accept-license")
    'accept_license'
    """
    return name.lstrip("-").replace("-", "_")
