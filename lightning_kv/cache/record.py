"""Reference tables by name: what a rollout can write down for later ones of the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_kv.cache.lags import LagRecorder
from lightning_kv.cache.mass import MassRecorder, RowRecorder
from lightning_kv.cache.outputs import OutputRecorder
from lightning_kv.cache.recorder import Recorder

RECORDERS: dict[str, type[Recorder]] = {
    own.name: own for own in (MassRecorder, RowRecorder, OutputRecorder, LagRecorder)
}
"""What can be recorded, by the name of the table."""


def recorders(wanted: Mapping[str, Mapping[str, Any]] | Sequence[str] | str) -> list[Recorder]:
    """A recorder for each table, with its settings.

    Raises:
        ValueError: A table that nobody records, or a setting it does not have.
    """
    names = [wanted] if isinstance(wanted, str) else wanted
    asked = wanted if isinstance(wanted, Mapping) else {name: {} for name in names}
    found = []
    for name, settings in asked.items():
        if name not in RECORDERS:
            raise ValueError(
                f"No reference table {name!r} can be recorded. It was asked for with {settings}. "
                f"Tables: {', '.join(RECORDERS)}."
            )
        try:
            found.append(RECORDERS[name](**settings))
        except TypeError as error:
            raise ValueError(
                f"The reference table {name!r} cannot be recorded with {dict(settings)}: {error}. "
                f"See {RECORDERS[name].__name__} for its settings."
            ) from error
    return found
