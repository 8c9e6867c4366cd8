"""Metrics of other packages, by ``package.module:Class``."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchmetrics import Metric, MetricCollection

from lightning_kv.metrics.base import ClipMetric, VideoMetric
from lightning_kv.metrics.latents import LatentMetric
from lightning_kv.metrics.mechanism import AttentionMetric
from lightning_kv.metrics.panorama import WorldMetric
from lightning_kv.metrics.set_base import SetMetric
from lightning_kv.utilities.lists import items_of

BASES = (VideoMetric, LatentMetric, AttentionMetric, WorldMetric, SetMetric)
"""What a rollout can be shown to."""

HOME = "lightning_kv"


def imported(text: str) -> type[ClipMetric] | type[SetMetric]:
    """The metric ``package.module:Class``; modules in the current folder are found too.

    Raises:
        ValueError: It cannot be imported, or is no metric.
    """
    module, _, name = text.partition(":")
    if not all(piece.isidentifier() for piece in module.split(".")) or module.endswith(".py"):
        raise ValueError(
            f"{text!r} is no address of a metric: {module!r} is no name of a module. Give "
            "PACKAGE.MODULE:CLASS, such as mine.glow:Glow for mine/glow.py."
        )
    with _current_folder():
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # somebody else's module may raise anything
            raise ValueError(
                f"The module {module!r} of {text!r} cannot be imported: {type(error).__name__}: "
                f"{error}. Give PACKAGE.MODULE:CLASS, installed or in the current folder."
            ) from error
    for piece in name.split("."):
        found = getattr(found, piece, None)
    return usable(found, repr(text))


def usable(found: Any, what: str = "This") -> type[ClipMetric] | type[SetMetric]:
    """The class, if it is one of a metric.

    Args:
        found: What was given.
        what: What it is called, for errors.

    Raises:
        ValueError: It is no metric, or has no value for a frame.
    """
    if not isinstance(found, type) or not issubclass(found, BASES) or found in BASES:
        raise ValueError(
            f"{what} is no metric of clips or of sets: it is {_what(found)}. Give a class that "
            "derives from VideoMetric of lightning_kv.metrics; or from LatentMetric, "
            "AttentionMetric, WorldMetric or SetMetric, where it looks at something else."
        )
    if issubclass(found, VideoMetric) and not _says_something(found):
        raise ValueError(
            f"{what} has no value for a frame: the class {found.__name__} writes neither "
            "frame_values nor reader. Write one of the two."
        )
    return found


def in_a_list(metrics: Any) -> list[Any]:
    """The metrics that were asked for, one by one.

    Args:
        metrics: A list of them; or one text, names with commas between, as on the command line.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(metrics, str):
        return items_of(metrics)
    one = isinstance(metrics, Metric) or (isinstance(metrics, type) and issubclass(metrics, Metric))
    several = isinstance(metrics, MetricCollection | Mapping)
    if isinstance(metrics, Iterable) and not one and not several:
        return list(metrics)
    how = "Pass a list, such as metrics=['psnr', Mine()]."
    if isinstance(metrics, MetricCollection):
        how = "Pass its metrics in a list: list(collection.values())."
    elif isinstance(metrics, Mapping):
        how = "Pass its metrics in a list: list(metrics.values())."
    elif one:
        how = "Pass it in a list: metrics=[...]."
    raise ValueError(f"The metrics of a run are a list, and this is {_what(metrics)}. {how}")


def _says_something(kind: type[VideoMetric]) -> bool:
    names = ("frame_values", "reader", "curve")
    return any(getattr(kind, name) is not getattr(VideoMetric, name) for name in names)


def source(kind: type) -> str:
    """Checksum of the files that define a metric of another package; empty for one of ours."""
    homes = sorted({cls.__module__ for cls in kind.__mro__ if _foreign(cls.__module__)})
    paths = [getattr(sys.modules.get(home), "__file__", None) for home in homes]
    files = [Path(path) for path in paths if path and Path(path).is_file()]
    if not files:
        return ""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return f"source {found.hexdigest()}"


def _foreign(module: str) -> bool:
    """Whether what a class is made of is neither ours, nor torch's, nor Python's."""
    known = {HOME, "torch", "torchmetrics", *sys.stdlib_module_names}
    return module.partition(".")[0] not in known


def _what(found: Any) -> str:
    if found is None:
        return "nothing"
    if isinstance(found, type) and found in BASES:
        return f"the base class {found.__name__} itself"
    if isinstance(found, MetricCollection):
        return "a MetricCollection"
    if isinstance(found, Metric):
        home = type(found).__module__.partition(".")[0]
        return f"a metric {type(found).__name__} of {home}"
    if isinstance(found, type):
        bases = ", ".join(base.__name__ for base in found.__bases__)
        return f"the class {found.__name__}, which derives from {bases}"
    return f"{type(found).__name__!r}"


@contextmanager
def _current_folder() -> Iterator[None]:
    """Python's own commands differ in whether the current folder is searched; here it is."""
    here = str(Path.cwd())
    known, before = here in sys.path, set(sys.modules)
    sys.path.append(here)
    try:
        yield
    finally:
        files = [getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before]
        if known or not any(file and Path(file).is_relative_to(here) for file in files):
            sys.path.remove(here)  # else what came from here may import more later
