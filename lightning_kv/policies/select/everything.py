"""Read all that is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.policies.base import SelectPart


@dataclass(frozen=True)
class Everything(SelectPart):
    """Read every row that is in memory."""

    name: ClassVar[str] = "everything"
    limited: ClassVar[bool] = False
