"""Metrics of other packages, by ``package.module:Class``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchmetrics import Metric, MetricCollection

from lightning_kv.metrics.base import ClipMetric, VideoMetric
from lightning_kv.metrics.latents import LatentMetric
from lightning_kv.metrics.mechanism import AttentionMetric
from lightning_kv.metrics.panorama import WorldMetric
from lightning_kv.metrics.set_base import SetMetric
from lightning_kv.utilities import addresses
from lightning_kv.utilities.addresses import described, file_of, foreign
from lightning_kv.utilities.files import checksum
from lightning_kv.utilities.lists import items_of

BASES = (VideoMetric, LatentMetric, AttentionMetric, WorldMetric, SetMetric)
"""What a rollout can be shown to."""


def imported(text: str) -> type[ClipMetric] | type[SetMetric]:
    """The metric ``package.module:Class``; modules in the current folder are found too.

    Raises:
        ValueError: It cannot be imported, or is no metric.
    """
    return usable(addresses.imported(text, "The metric"), repr(text))


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
    homes = sorted({cls.__module__ for cls in kind.__mro__ if foreign(cls.__module__)})
    files = [file for file in map(file_of, homes) if file]
    return f"source {checksum(*files)}" if files else ""


def _what(found: Any) -> str:
    if isinstance(found, type) and found in BASES:
        return f"the base class {found.__name__} itself"
    if isinstance(found, MetricCollection):
        return "a MetricCollection"
    if isinstance(found, Metric):
        home = type(found).__module__.partition(".")[0]
        return f"a metric {type(found).__name__} of {home}"
    return described(found)
