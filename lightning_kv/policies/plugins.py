"""Parts of other packages: by ``package.module:Class``, or by an entry point of a package."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_kv.policies.part import PARTS, Part

GROUP = "lightning_kv.policies"
"""Entry points of this group name a part, or a module that holds some."""

HOME = "lightning_kv.policies."


def imported(text: str) -> type[Part]:
    """The part ``package.module:Class``; modules in the current folder are found too.

    Raises:
        ValueError: It cannot be imported, or is no part.
    """
    module, _, name = text.partition(":")
    with _current_folder():
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # somebody else's module may raise anything
            raise ValueError(
                f"The module {module!r} of {text!r} cannot be imported. {_reason(error)}. Give "
                "PACKAGE.MODULE:CLASS, installed or in the current folder."
            ) from error
    there = ", ".join(cls.__name__ for cls in _parts_of(found)) or "none"
    for piece in name.split("."):
        found = getattr(found, piece, None)
    if not is_part(found):
        raise ValueError(
            f"{text!r} is no part of a policy. It is {_what(found)}; the parts that "
            f"{module!r} defines: {there}. Give a class that derives from RetainPart, SelectPart, "
            "BudgetPart, PositionsPart or PrecisionPart."
        )
    if "__dataclass_params__" not in found.__dict__:
        raise ValueError(
            f"The part {text!r} is no dataclass of its own, so its settings would be lost. It is "
            f"{_what(found)}. Write @dataclass(frozen=True) above it."
        )
    return found


def is_part(found: Any) -> bool:
    """Whether this is a class of one of the five kinds."""
    return isinstance(found, type) and issubclass(found, Part) and found.kind in PARTS


def address(cls: type[Part]) -> str:
    """How a configuration names a part so that any process can find it again."""
    known = PARTS[cls.kind].get(cls.name) is cls
    installed = known and (cls.__module__.startswith(HOME) or cls in installed_parts())
    if installed or (known and "<locals>" in cls.__qualname__):
        return cls.name
    return f"{cls.__module__}:{cls.__qualname__}"


def sources(parts: Iterable[Part]) -> dict[str, str]:
    """Modules of other packages that parts come from, with the SHA-256 of their files."""
    found = {}
    for part in parts:
        name = type(part).__module__
        path = getattr(sys.modules.get(name), "__file__", None)
        if not name.startswith(HOME) and path and Path(path).is_file():
            found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


@cache
def installed_parts() -> frozenset[type[Part]]:
    """Parts that installed packages offer; a package that is broken is warned about."""
    found: set[type[Part]] = set()
    for entry in entry_points(group=GROUP):
        try:
            found |= set(_offered(entry))
        except Exception as error:  # one package must not take the others down
            package = entry.dist.name if entry.dist else "a package"
            warnings.warn(
                f"The entry point {entry.name!r} ({entry.value}) of {package} brings no policy. "
                f"{_reason(error)}. Mend or uninstall it.",
                stacklevel=2,
            )
    return frozenset(found)


def _offered(entry: EntryPoint) -> list[type[Part]]:
    found = entry.load()
    parts = _parts_of(found) if isinstance(found, ModuleType) else [found]
    named = [cls for cls in parts if is_part(cls) and cls.name]
    if not named:
        raise ValueError(f"{entry.value} is no part with a `name`, and no module that holds one")
    return named


def _parts_of(module: ModuleType) -> list[type[Part]]:
    own = (x for x in vars(module).values() if is_part(x))
    return [cls for cls in own if cls.__module__ == module.__name__]


@contextmanager
def _current_folder() -> Iterator[None]:
    """Python's own commands differ in whether the current folder is searched; here it is."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = "importlib" in last.filename
    return f"{type(error).__name__}: {error}" + (
        "" if inside else f" ({last.filename}:{last.lineno})"
    )


def _what(found: Any) -> str:
    if found is None:
        return "nothing"
    return f"the class {found.__name__}" if isinstance(found, type) else f"{type(found).__name__!r}"
