"""What people type, read into the options of a command: one grammar for all commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_kv.assets import found as shipped
from lightning_kv.commands.options import (
    SHORT,
    Command,
    Option,
    kinds_of,
    listed,
    options_of,
    plain,
    usage,
)
from lightning_kv.utilities.lists import items_of
from lightning_kv.utilities.nearest import hint, nearest

COLLECTED = "accept_license"

"""The list that grows where it is given again; of others the last word counts."""

KINDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def parse(command: Command, words: Sequence[str]) -> Any:
    """The options of a command from YAML files (``-c``) and words; words win.

    Raises:
        ValueError: Something that is no option, a value that does not fit, or too little.
        SystemExit: Help was asked for, and is written.
    """
    known = options_of(command)
    parser, words = parser_of(command, known), normal(command, known, words)
    try:
        found = parser.parse_args(words)
        made = parser.instantiate(found)
    except argparse.ArgumentError as error:
        raise ValueError(explain(command, known, str(error))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The settings file of -c cannot be read: {type(error).__name__}: {error}. Give a "
            "YAML file in UTF-8."
        ) from error
    check_groups(command.options, made)
    missing = [
        command.positional.get(one.key, one.label)
        for one in known
        if one.default is dataclasses.MISSING and made[one.key] in (None, [], ())
    ]
    if missing:
        raise ValueError(
            f"`{command.name}` was not given all that is required: {', '.join(missing)}. Type "
            f"`{usage(command, known)}`."
        )
    return built(command.options, made)


def parser_of(command: Command, known: Sequence[Option]) -> Any:
    """The parser of a command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning-kv {command.name}",
        usage=usage(command, known),
        description=command.options.__doc__.partition("Args:")[0].strip(),
        epilog=command.after,
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    text = "YAML file of options; may be given again."
    parser.add_argument("-c", "--config", action="config", metavar="FILE", help=text)
    for one in known:
        add(parser, one, one.key in command.positional)
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help, action.metavar = "Write all options as YAML, and stop.", ""
        if any(name.endswith(".help") for name in action.option_strings):
            action.help = argparse.SUPPRESS
    return parser


def add(parser: Any, one: Option, positional: bool) -> None:
    """One option."""
    inside, default = listed(one.kind), one.default
    given = {} if default is dataclasses.MISSING else {"default": default}
    if positional:
        many = {"nargs": "*", "type": inside} if inside else {"nargs": "?", "type": one.kind}
        parser.add_argument(one.key, metavar=one.metavar, help=one.help, **many, **given)
        return
    names = [f"--{one.key}", *([SHORT[one.key]] if one.key in SHORT else [])]
    kind = one.kind
    if inside:
        several = dict[str, Any] if dict in map(typing.get_origin, kinds_of(inside)) else str
        kind = list[inside] | several | str | None
    elif default is dataclasses.MISSING and not dataclasses.is_dataclass(kind):
        kind = kind | None
    parser.add_argument(*names, type=kind, help=one.help, **given)
    action = next(x for x in parser._actions if names[0] in x.option_strings)
    action.metavar, action.typed = one.metavar, one.typed
    if one.default is True:
        action.metavar = "false"


def normal(command: Command, known: Sequence[Option], words: Sequence[str]) -> list[str]:
    """Words as the parser wants them: ``--key=value`` throughout, and last what has no name.

    Raises:
        ValueError: An option that is not known, or without its value.
    """
    left, found, free, seen = list(words), [], [], set()
    while left:
        word = left.pop(0)
        if word == "--":
            free += left
            break
        if not word.startswith("-") or re.fullmatch(r"-\d*\.?\d*", word):
            free.append(word)
            continue
        if word in ("-h", "--help") or word.startswith("--print_config"):
            found.append(word)
            continue
        name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], "", "")
        value, equals = (word[2:], word[2:]) if not word.startswith("--") else (value, equals)
        if name in ("-c", "--config"):
            file = shipped(value if equals else value_of("-c", left, known))
            found.append(f"--config={with_classes(file, known)}")
            continue
        one, rest = option_named(command, known, name)
        if not equals and kinds_of(one.kind)[0] is bool:
            value = left.pop(0).lower() if left and left[0].lower() in said_by(one) else "true"
        elif not equals:
            value = value_of(name, left, known)
        found.append(word_of(one, rest, value, one.key in seen, one.key in command.repeated))
        seen.add(one.key)
    slots = [one for one in known if one.key in command.positional]
    if len(free) > len(slots) and not any(listed(one.kind) for one in slots):
        raise ValueError(
            f"`{command.name}` has no place for the word {free[len(slots)]!r}. "
            f"Type `{usage(command, known)}`."
        )
    return [*found, *(["--", *free] if free else [])]


def with_classes(file: str | Path, known: Sequence[Option]) -> str:
    """A settings file; what it holds where it names a class alone, ``data: package:Class``."""
    import yaml

    try:
        held = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return str(file)  # which the parser says
    named = {one.key.partition(".")[0] for one in known if one.key.endswith(".class_path")}
    alone = [key for key in named if isinstance(held, dict) and isinstance(held.get(key), str)]
    if not alone:
        return str(file)
    return json.dumps(held | {key: {"class_path": held[key]} for key in alone}, default=str)


def said_by(flag: Option) -> set[str]:
    """Words that a flag may be followed by."""
    words = [typing.get_args(kind) for kind in kinds_of(flag.kind)[1:]]
    return {"true", "false", *(word for each in words for word in each)}


def word_of(one: Option, rest: str, value: str, again: bool, whole: bool) -> str:
    """One option with its value."""
    if whole:
        return f"--{one.key}{'+' * again}={json.dumps([value])}"
    if rest == "+" or (again and one.key == COLLECTED):
        return f"--{one.key}+={json.dumps(as_list(value))}"
    return f"--{one.key}{rest}={value}"


def value_of(name: str, left: list[str], known: Sequence[Option]) -> str:
    """The word after an option.

    Raises:
        ValueError: There is none, or another option.
    """
    names = {plain(one.key) for one in known} | {plain(one.typed) for one in known}
    if not left or (left[0].startswith("--") and plain(left[0].partition("=")[0]) in names):
        then = f" The next word is {left[0]!r}." if left else ""
        raise ValueError(f"{name} needs a value, and has none.{then} Write {name} VALUE.")
    return left.pop(0)


def option_named(command: Command, known: Sequence[Option], name: str) -> tuple[Option, str]:
    """The option that a word names, and what follows its key: ``+`` or a key inside of it.

    Raises:
        ValueError: There is none.
    """
    text = next((long for long, short in SHORT.items() if short == name), plain(name))
    more = "+" if text.endswith("+") else ""
    text = text.removesuffix("+")
    by_name = {one.key: one for one in known if one.typed}
    by_name |= {one.typed: one for one in known if one.typed}
    for way in (text, f"trainer.{text}", text.removeprefix("trainer."), f"{text}.class_path"):
        if way in by_name:
            return by_name[way], more
    for one in by_name.values():
        if dict in map(typing.get_origin, kinds_of(one.kind)) and text.startswith(f"{one.key}."):
            return one, text.removeprefix(one.key)
    raise ValueError(unknown(command, known, name.lstrip("-")))


def unknown(command: Command, known: Sequence[Option], name: str) -> str:
    """What to say of an option that is none: why it is refused, or the nearest one."""
    place, _, last = name.rpartition(".")
    kinds = typing.get_type_hints(command.options)
    if not place and dataclasses.is_dataclass(kinds.get(plain(last))):
        return f"--{name} alone is no option: {members(plain(last), kinds[plain(last)])}"
    place = place or "trainer"  # whose arguments are found without it too
    refused = getattr(kinds.get(place), "REFUSED", {})
    if why := refused.get(plain(last)):
        return f"--{name} is refused: {why}. Leave it out."
    names = {plain(one.typed): one.typed for one in known if one.typed}
    names |= {one.typed.rpartition(".")[2]: one.typed for one in known if "trainer." in one.typed}
    near = hint(plain(name), names, names)
    inside = {f"{place}." * ("." in name) + each: each for each in refused}
    found = nearest(plain(name), [*names, *inside])
    if found in inside:
        near = f" Did you mean '{place}.{inside[found]}'? It is refused: {refused[inside[found]]}."
    return f"No setting {name!r}.{near} `lightning-kv {command.name} --help` tells them all."


def explain(command: Command, known: Sequence[Option], text: str) -> str:
    """An error of the parser, as one says it to somebody who typed a command."""
    key = re.search(r'Parser key "([\w.]+)"', text)
    one = next((each for each in known if key and each.key == key[1]), None)
    if found := re.search(r"Option '([\w.\-]+)' is not accepted", text):
        inside = item_fields(one)
        if not inside:
            return unknown(command, known, found[1])
        near, names = hint(found[1], inside), ", ".join(inside)
        return f"No setting {found[1]!r} in {key[1]}.{near} It has {names}."
    if found := re.search(r"(?:File does not exist|Path is not a file|not readable): '(.*)'", text):
        return (
            f"{found[1]} is no settings file that can be read. Give -c a YAML file that is there."
        )
    if "parsing config" in text:
        return f"The file of -c is no YAML. {' '.join(text.split())}. Write `option: value` lines."
    value = re.search(r"(?:Got|Given) value: (.*)", text, re.DOTALL)
    if one is None or value is None:
        return f"{' '.join(text.split())}. See `lightning-kv {command.name} --help`."
    label = f"--{one.typed}" if one.typed else one.metavar
    return f"{label} {value[1].strip()} does not fit. It takes {words_for(one)}."


def item_fields(one: Option | None) -> list[str]:
    """Fields of the dataclass that an option lists."""
    inside = [] if one is None else [x for k in kinds_of(one.kind) for x in typing.get_args(k)]
    made = [kind for kind in inside if dataclasses.is_dataclass(kind)]
    return [each.name for kind in made for each in dataclasses.fields(kind)]


def words_for(one: Option) -> str:
    """What an option takes."""
    if (inside := listed(one.kind)) is not None:
        return f"a list, such as {one.typed} a,b" if inside is str else "a list, such as [a,b]"
    said = []
    for kind in kinds_of(one.kind):
        if typing.get_origin(kind) is Literal:
            said.append(" or ".join(map(repr, typing.get_args(kind))))
        else:
            said.append(KINDS.get(kind, "a mapping" if typing.get_origin(kind) is dict else "text"))
    return " or ".join(said)


def as_list(value: Any) -> list[Any]:
    """Items from ``[a,b]`` or ``a,b``; where a mapping is among them, all is read as YAML.

    Raises:
        ValueError: Brackets are not closed.
    """
    if not isinstance(value, str):
        return [value] if isinstance(value, dict) else list(value)
    items = items_of(value)
    if "{" not in value:
        return items
    import yaml

    try:
        return yaml.safe_load(value if value.strip().startswith("[") else f"[{value}]")
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"The list {value!r} cannot be read: {why}. Write [a, {{name: b, key: value}}]."
        ) from error


def check_groups(kind: type, values: Any) -> None:
    """Refuse a value where options of their own are due.

    Raises:
        ValueError: There is one.
    """
    for key, group in typing.get_type_hints(kind).items():
        if not dataclasses.is_dataclass(group) or hasattr(values[key], "__dict__"):
            continue
        raise ValueError(f"--{key} {values[key]!r} does not fit: {members(key, group)}")


def members(key: str, group: type) -> str:
    """What to say where options of their own are due."""
    names = ", ".join(each.name for each in dataclasses.fields(group))
    return (
        f"it has options of its own. Give those, as --{key}.NAME VALUE, or in a file indented "
        f"below `{key}:`. They are {names}."
    )


def built(kind: type, values: Any) -> Any:
    """A dataclass from what was read."""
    made = {}
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        value, hint = values[each.name], hints[each.name]
        if dataclasses.is_dataclass(hint):
            value = built(hint, value)
        elif listed(hint) is not None and value is not None:
            pair = any(typing.get_origin(x) is tuple for x in kinds_of(hint))
            value = (tuple if pair else list)(as_list(value))
        made[each.name] = value
    return kind(**made)


class Help(argparse.RawDescriptionHelpFormatter):
    """Names beside their meaning, in at most 100 columns."""

    def __init__(self, prog: str, **given: Any) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.metavar
        names = [name for name in action.option_strings if not name.endswith("+")]
        names = [f"--{typed}" if (typed := getattr(action, "typed", "")) else names[-1]] + [
            name for name in names if not name.startswith("--")
        ]
        value = "" if action.nargs == 0 else action.metavar or ""
        return f"{', '.join(sorted(names, key=len))} {value}".rstrip()
