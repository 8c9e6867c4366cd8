"""Keep every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Everything(RetainPart):
    """Keep every row (the full cache, and the reference)."""

    name: ClassVar[str] = "everything"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("full", "Keep and read everything: the reference."),
    )
    limited: ClassVar[bool] = False
