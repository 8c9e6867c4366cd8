"""Objects of other packages, by ``package.module:Class`` or ``package.module.Class``."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = {"lightning_kv", "torch", "torchmetrics", *sys.stdlib_module_names}


def imported(address: str, what: str, give: str = "PACKAGE.MODULE:CLASS") -> Any:
    """What lies at an address, None where its module has no such name.

    Modules in the current folder are found too.

    Args:
        address: Module and name; a class inside of a class has dots in its name.
        what: What is sought, for errors, such as ``The part``.
        give: What would work, for errors.

    Raises:
        ValueError: It is no address, or the module cannot be imported.
    """
    module, name = divided(address)
    named = [*module.split("."), *name.split(".")]
    if not all(piece.isidentifier() for piece in named) or module.endswith(".py"):
        raise ValueError(
            f"{what} {address!r} is no address of a class. Give {give}, such as mine.glow:Glow "
            "for the class Glow in mine/glow.py."
        )
    with _current_folder():
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # somebody else's module may raise anything
            raise ValueError(
                f"{what} {address!r} cannot be imported: {reason(error)}. Give {give}, installed "
                "or in the current folder."
            ) from error
    for piece in name.split("."):
        found = getattr(found, piece, None)
    return found


def divided(address: str) -> tuple[str, str]:
    """Module and name.

    >>> divided("mine.glow:Glow") == divided("mine.glow.Glow") == ("mine.glow", "Glow")
    True
    """
    module, _, name = address.partition(":") if ":" in address else address.rpartition(".")
    return module, name


def described(found: Any) -> str:
    """What something is, for errors.

    >>> described(None), described(3), described(bool)
    ('nothing', "'int'", 'the class bool, which derives from int')
    """
    if not isinstance(found, type):
        return "nothing" if found is None else f"{type(found).__name__!r}"
    bases = ", ".join(base.__name__ for base in found.__bases__)
    return f"the class {found.__name__}, which derives from {bases}"


def foreign(module: str) -> bool:
    """Whether a module is neither ours, nor torch's, nor Python's."""
    return module.partition(".")[0] not in OURS


def file_of(module: str) -> Path | None:
    """The file of a module that is loaded."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return Path(path) if path and Path(path).is_file() else None


def reason(error: BaseException) -> str:
    """An error in a line, with the last place in a file of the module's author."""
    python, here = Path(traceback.__file__).parent, Path(__file__).parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and here not in Path(frame.filename).parents
        and (python not in Path(frame.filename).parents or "-packages" in frame.filename)
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


@contextmanager
def _current_folder() -> Iterator[None]:
    """Python's own commands differ in whether the current folder is searched; here it is."""
    here = str(Path.cwd())
    known, before = here in sys.path, set(sys.modules)
    sys.path.append(here)
    try:
        yield
    finally:
        files = [file_of(name) for name in set(sys.modules) - before]
        if known or not any(file and file.is_relative_to(here) for file in files):
            sys.path.remove(here)  # else what came from here may import more later
