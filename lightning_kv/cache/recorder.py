"""What a rollout attended to, written down for rollouts of the same prompt and noise.

A chunk's passes count alike, but its commit pass half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.view import PassView

LIMIT = 2 * 2**30  # bytes of a table of one clip, unless more is asked for
COMMIT = 0.5  # weight of a commit pass; its queries meet history as the next chunk's will not


@dataclass(frozen=True)
class Clip:
    """Which rollout a table was recorded in.

    Args:
        key: Prompt key of the sample.
        seed: Base of its random draws: the rollout's seed and the key.
        frames: Latent frames.
        chunks: Chunks.
        geometry: Sizes of the model.
        passes: The most passes of a chunk and namespace.
        prompt: Text of the sample.
        context: Given latent frames.
        events: Prompt switches and scene cuts on the way.
    """

    key: str | None
    seed: int
    frames: int
    chunks: int
    geometry: Geometry
    passes: int = field(default=0, compare=False)
    prompt: str | None = None
    context: int = 0
    events: tuple[Event, ...] = ()

    def check(self, other: Clip, name: str) -> None:
        """Refuse a table that was recorded in another rollout than this one.

        Raises:
            ValueError: Says in what they differ.
        """
        for what, text in (
            ("key", "sample"),
            ("seed", "seed"),
            ("frames", "length"),
            ("chunks", "number of chunks"),
            ("geometry", "model"),
            ("prompt", "prompt"),
            ("context", "number of given frames"),
            ("events", "list of events"),
        ):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(
                    f"The reference table {name!r} is of another {text}: it was recorded for "
                    f"{theirs!r}, and this rollout has {mine!r}. Record it in the reference "
                    "rollout of this very sample: rollout(..., record=policy.needs)."
                )


class Recorder:
    """Watches a rollout and makes one table per sample.

    Args:
        queries: How many stand for those of a pass; see the recorder.
        limit: Bytes that a table of one clip may take; more is refused before the rollout.

    Raises:
        ValueError: No queries.
    """

    name: str = ""
    makes: type = object
    """What its tables are: each has a ``clip`` and the ``queries`` it was recorded with."""

    def __init__(self, queries: int, limit: int = LIMIT) -> None:
        if queries < 1:
            raise ValueError(
                f"The reference table {self.name!r} was asked for with queries={queries}, which "
                "would leave nothing to write down. Give 1 or more."
            )
        self.queries, self.limit = queries, limit
        self.clips: list[Clip] = []

    def begin(self, clips: Sequence[Clip]) -> None:
        """Told of the samples before the first pass.

        Raises:
            ValueError: The tables would take more bytes than the limit.
        """
        self.clips = list(clips)
        size = self.size(clips[0])
        if size > self.limit:
            raise ValueError(
                f"The reference table {self.name!r} takes {size:,} bytes per clip, and its limit "
                f"is {self.limit:,}. Record less of it, or give a larger `limit`."
            )

    def size(self, clip: Clip) -> int:
        """Bytes of the table of one clip, at most."""
        raise TypeError(f"{type(self).__name__} does not say how many bytes its tables take.")

    def __call__(self, view: PassView) -> None:
        """Note one pass of one layer."""
        if not view.step.rebuild:
            self.note(view)

    def note(self, view: PassView) -> None:
        """Take up what a pass of one layer attended to."""
        raise TypeError(f"{type(self).__name__} does not say what it notes.")

    def table(self, sample: int) -> Any:
        """The table of one sample, once the rollout has ended."""
        raise TypeError(f"{type(self).__name__} does not make tables.")


def weight_of(step: Pass) -> float:
    """Of a pass in the mean over its chunk."""
    return COMMIT if step.phase == "commit" else 1.0
