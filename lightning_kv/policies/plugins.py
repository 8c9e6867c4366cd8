"""Parts of other packages: by ``package.module:Class``, or by an entry point of a package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from lightning_kv.policies.part import PARTS, NameTaken, Part
from lightning_kv.utilities import addresses
from lightning_kv.utilities.addresses import described, file_of, foreign, reason
from lightning_kv.utilities.files import checksum

GROUP = "lightning_kv.policies"
"""Entry points of this group name a part, or a module that holds some."""

HOME = "lightning_kv.policies."
BASES = tuple(HOME + name for name in ("base", "part", "scored"))

CLASHES: dict[str, str] = {}
"""Names that two installed packages want, and how to say so: neither gets it."""


def imported(text: str) -> type[Part]:
    """The part ``package.module:Class``; modules in the current folder are found too.

    Raises:
        ValueError: It cannot be imported, or is no part.
    """
    found = addresses.imported(text, "The part")
    if not is_part(found) or found.__module__ in BASES:
        module = sys.modules[addresses.divided(text)[0]]
        there = ", ".join(cls.__name__ for cls in _parts_of(module)) or "none"
        raise ValueError(
            f"{text!r} is no part of a policy. It is {described(found)}; the parts that "
            f"{module.__name__!r} ({file_of(module.__name__)}) defines: {there}. Give a class that "
            "derives from RetainPart, SelectPart, BudgetPart, PositionsPart or PrecisionPart."
        )
    return checked(found)


def checked(cls: type[Part]) -> type[Part]:
    """The class, if its settings would not be lost.

    Raises:
        ValueError: It is no dataclass of its own.
    """
    if "__dataclass_params__" not in cls.__dict__:
        raise ValueError(
            f"The part {cls.__module__}:{cls.__qualname__} is no dataclass of its own, so its "
            f"settings would be lost. It is {described(cls)}. Write @dataclass(frozen=True) above "
            "it."
        )
    return cls


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
    """Modules that parts of other packages run, with the SHA-256 of their files.

    All that is loaded of the packages of a part and of its base classes; of a module without a
    package, its neighbours in the folder too.
    """
    classes = [base for part in parts for base in type(part).__mro__]
    homes = {cls.__module__ for cls in classes if foreign(cls.__module__)}
    tops = {name.partition(".")[0] for name in homes}
    folders = {file_of(name).parent for name in homes if "." not in name and file_of(name)}
    folders = {folder for folder in folders if not folder.name.endswith("-packages")}
    found = {}
    for name in sorted(sys.modules):
        path = file_of(name)
        if path and (name.partition(".")[0] in tops or path.parent in folders):
            found[name] = checksum(path)
    return found


@cache
def installed_parts() -> frozenset[type[Part]]:
    """Parts that installed packages offer; a package that is broken is warned about."""
    found: set[type[Part]] = set()
    for entry in entry_points(group=GROUP):
        try:
            found |= set(_offered(entry))
        except (Exception, SystemExit) as error:  # one package must not take the others down
            if isinstance(error, NameTaken) and not error.owner.__module__.startswith(HOME):
                CLASHES[error.name] = f"{error} Or uninstall one of their packages."
            package = entry.dist.name if entry.dist else "a package"
            warnings.warn(
                f"The entry point {entry.name!r} ({entry.value}) of {package} brings no policy. "
                f"{reason(error)}. Mend or uninstall it.",
                stacklevel=2,
            )
    return frozenset(found)


def _offered(entry: EntryPoint) -> list[type[Part]]:
    found = entry.load()
    parts = _parts_of(found) if isinstance(found, ModuleType) else [found]
    named = [cls for cls in parts if is_part(cls) and cls.name]
    if not named:
        raise ValueError(f"{entry.value} is no part with a `name`, and no module that holds one")
    return [checked(cls) for cls in named]


def _parts_of(module: ModuleType) -> list[type[Part]]:
    own = (x for x in vars(module).values() if is_part(x))
    return [cls for cls in own if cls.__module__ == module.__name__]
