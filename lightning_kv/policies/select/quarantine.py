"""Read all that is held but what has been set aside for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import SelectPart


@dataclass(frozen=True)
class Quarantine(SelectPart):
    """Read all frames but those that a retain part holds back: its column ``aside`` is above 0.

    A pass that makes frames final reads them too: by then the retain part has decided on them.
    """

    name: ClassVar[str] = "quarantine"
    limited: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {"aside": "max"}

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """Frames that are not aside."""
        if not view.frames or view.step.final:
            return None
        aside = view.by_frame(view.field("aside").unsqueeze(1), "max") > 0
        return Selection(frames=~aside & view.present.unsqueeze(1))
