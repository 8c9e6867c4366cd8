"""Objects of a user's own package: by ``package.module:Class``, or by ``class_path``."""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_kv.utilities.addresses import described, imported

Address = str | Mapping[str, Any]
"""``package.module:Class``, ``package.module.Class``, or a mapping with ``class_path``."""

KEYS = {"class_path", "init_args"}


def is_address(spec: Any) -> bool:
    """Whether this names a class of some package, and is not a word such as ``ddp``."""
    return isinstance(spec, Mapping) or ":" in spec or "." in spec


def instance(spec: Address, base: type, option: str, usual: Mapping[str, Any] | None = None) -> Any:
    """An object of the class that is named.

    Args:
        spec: Its address, alone or with ``init_args``.
        base: What it must derive from.
        option: Where it was given, for errors.
        usual: Arguments that it is given where it takes them and ``init_args`` do not say them.

    Raises:
        ValueError: There is no such class, it is of another kind, or cannot be made so.
    """
    path, init = divided(spec, option)
    kind = class_of(path, base, option)
    taken = taken_by(kind)
    known = {name: value for name, value in (usual or {}).items() if value is not None}
    extra = {name: value for name, value in known.items() if name in taken}
    try:
        return kind(**checked(kind, extra | init))
    except Exception as error:  # somebody else's class may raise anything
        given = ", ".join(f"{name}={value!r}" for name, value in init.items()) or "nothing"
        said = " ".join(str(error).split())
        raise ValueError(
            f"{option} {path} cannot be made: {type(error).__name__}: {said} Its init_args: "
            f"{given}. It takes {', '.join(sorted(taken)) or 'none'}."
        ) from error


def divided(spec: Address, option: str) -> tuple[str, dict[str, Any]]:
    """Address and arguments.

    Raises:
        ValueError: The mapping has other keys.
    """
    if isinstance(spec, str):
        return spec, {}
    init = spec.get("init_args") or {}
    if (
        not set(spec) <= KEYS
        or not isinstance(spec.get("class_path"), str)
        or not isinstance(init, Mapping)
    ):
        raise ValueError(
            f"{option} was given {dict(spec)}, which names no class. Write {{class_path: "
            "package.module.Class, init_args: {name: value}}."
        )
    return spec["class_path"], dict(init)


def class_of(path: str, base: type, option: str) -> type:
    """The class at an address; modules in the current folder are found too.

    Raises:
        ValueError: There is none, or it is of another kind.
    """
    what = f"package.module:Class, of a class that derives from {base.__name__}"
    found = imported(path, option, what)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(
            f"{option} {path} is of the wrong kind: it is {described(found)}. Give {what}."
        )
    if inspect.isabstract(found):
        lacks = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"{option} {path} lacks {lacks}. Give {what} that has them.")
    return found


def taken_by(kind: type) -> set[str]:
    """Names of the arguments of a class, those that its bases take for it included."""
    found: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        own = inspect.signature(cls.__init__).parameters.values()
        named = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
        found |= {each.name for each in own if each.kind.name in named}
        if not any(each.kind.name == "VAR_KEYWORD" for each in own):
            break
    return found - {"self"}


def checked(kind: type, init: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the types that the class says, nested classes made.

    Raises:
        ValueError: One is unknown or does not fit.
    """
    from jsonargparse import ArgumentParser

    if not init:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "made", instantiate=False, fail_untyped=False)
    try:
        found = parser.instantiate(parser.parse_object({"made": init}, defaults=False))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return {name: found["made"][name] for name in init}


def metrics_of(specs: Iterable[Any] | None) -> list[Any] | None:
    """Metrics by name, those with ``class_path`` made.

    Raises:
        ValueError: There is no such class, or it is no metric.
    """
    from torchmetrics import Metric

    if specs is None:
        return None
    return [instance(x, Metric, "--metrics") if isinstance(x, Mapping) else x for x in specs]
