"""Focused reading for models that denoise chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import PassView
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.select.focused.scores import FocusedScores, by_importance

WINDOW = 21  # frames: the window whose filling starts the paper's selection


@dataclass(frozen=True)
class Focused(FocusedScores):
    """Read the frames that the queries look at and that are unlike the rest.

    Focused Forcing (arXiv 2605.18346), the form for chunk-wise models: per head and query frame,
    ``λ · attention + (1 - λ) · diversity``, both standardised over the history (``standardise:
    all`` is the release's form for LongLive). The best of the first frames (the anchor) and the
    current chunk are always read.

    Args:
        start: ``budget`` starts when the history exceeds the budget; ``paper`` when a window of 21
            frames is full; a number at that chunk. Before it, everything is read.
    """

    name: ClassVar[str] = "focused"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "focused-forcing",
            "Keep everything, read what is looked at and diverse, per head and query frame.",
            "Focused Forcing, arXiv 2605.18346",
            ("reads",),
            {"select": {"part": "focused", "budget": "9f"}},
            "1f to 6f by head on Self Forcing, 1f to 9f on others; of 18f held",
        ),
        Preset(
            "focused-forcing-paper",
            "As published for Self Forcing: keep a sink of 15 that follows the chunk, and the "
            "newest 3; read 1 to 6 of them by the importance of the head, once the window is full.",
            "Focused Forcing, arXiv 2605.18346",
            ("memory", "reads"),
            {
                "retain": {"part": "window", "sink": 15, "budget": "18f"},
                "select": {"part": "focused", "start": "paper", "budget": by_importance("6f")},
                "positions": {"part": "sink-lag", "sink": 15, "lag": 21},
            },
            "18f held, 15 of it the sink; 1f to 6f read, by head",
        ),
        Preset(
            "focused-forcing-paper-longlive",
            "As published for LongLive: keep the first 3 frames and the newest 15; read 1 to 9 of "
            "them by the importance of the head, once the window is full.",
            "Focused Forcing, arXiv 2605.18346",
            ("memory", "reads"),
            {
                "retain": {"part": "window", "sink": 3, "budget": "18f"},
                "select": {
                    "part": "focused",
                    "attention_weight": 0.46,
                    "standardise": "all",
                    "start": "paper",
                    "budget": by_importance("9f"),
                },
            },
            "18f held, 3 of it the sink; 1f to 9f read, by head",
        ),
    )
    start: str | int = "budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.start, str) and self.start not in ("budget", "paper"):
            raise ValueError(
                f"A focused selection cannot start at {self.start!r}. "
                "Give budget, paper, or the number of a chunk."
            )
        if not isinstance(self.start, str):
            between(self, 0, None, "start")

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """Everything before the start; the shared flow from there on."""
        chunk = view.geometry.chunk or view.query_frames
        first = {"budget": 0, "paper": WINDOW // chunk - 1}.get(self.start, self.start)
        return None if view.step.chunk < first else super().pick(view, state)
