"""A correct part, parts with one fault each that the conformance suite must find, and policies."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Retention, Selection
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import (
    CachePolicy,
    PositionsPart,
    RetainPart,
    SelectPart,
    UnitPart,
)
from lightning_kv.policies.registry import build_budget, build_part
from lightning_kv.policies.retain.window import Window


def policy(part=None, **more):
    """A policy of the full cache's parts, but for some that are given as words or objects."""
    parts = {"retain": "everything", "select": "everything", "positions": "absolute"}
    parts |= {"precision": "as-computed"} | ({part.kind: part} if part else {}) | more
    built = {k: build_part(k, x) if isinstance(x, str | dict) else x for k, x in parts.items()}
    return CachePolicy("test", **built)


def budgeted(cls, amount="8f", **settings):
    """A part with so much to keep or read."""
    return cls(build_budget(amount), **settings)


@dataclass(frozen=True)
class Longest(UnitPart):
    """Correct: the rows, or frames, whose keys are longest."""

    name: ClassVar[str] = "longest"

    def scores(self, view, state):
        own = view.keys("raw").norm(dim=-1).unsqueeze(1)
        return view.by_frame(own) if self.unit == "frame" else own


@dataclass(frozen=True)
class WritesAnEntry(Longest):
    """Scales the keys that it is shown."""

    name: ClassVar[str] = "writes-an-entry"

    def scores(self, view, state):
        view.keys("read").mul_(0.5)
        return super().scores(view, state)


@dataclass(frozen=True)
class WritesUnseen(Longest):
    """The same by a way that leaves no trace in torch's counters."""

    name: ClassVar[str] = "writes-unseen"

    def scores(self, view, state):
        view.keys("read").data[:, 0] *= 0.5
        return super().scores(view, state)


@dataclass(frozen=True)
class WritesQueries(SelectPart):
    """Scales the queries of the pass, unseen."""

    name: ClassVar[str] = "writes-queries"

    def pick(self, view, state):
        view.raw_query.data.mul_(0.5)


@dataclass(frozen=True)
class RemembersInItself(Longest):
    """Counts its commits in itself, and drops the newest rows in every second one."""

    name: ClassVar[str] = "remembers-in-itself"
    seen: Any = field(default_factory=Counter, compare=False)

    def scores(self, view, state):
        self.seen[view.layer] += 1
        own = super().scores(view, state)
        return own if self.seen[view.layer] % 2 else -own


@dataclass(frozen=True)
class RemembersInItsClass(Longest):
    """The scores of the first sample serve all."""

    name: ClassVar[str] = "remembers-in-its-class"
    known: ClassVar[dict] = {}

    def scores(self, view, state):
        key = view.layer, view.step.chunk, view.lengths, self.budget
        own = super().scores(view, state)
        found = self.known.setdefault(key, own)
        return found if found.shape == own.shape else own


@dataclass(frozen=True)
class LooksAtTheFirst(Longest):
    """Ranks keys in the first sample alone."""

    name: ClassVar[str] = "looks-at-the-first"

    def scores(self, view, state):
        own = super().scores(view, state)
        return own if view.sample == 0 else torch.zeros_like(own)


@dataclass(frozen=True)
class DropsInNoise(RetainPart):
    """Loses the last row that it holds whenever a noisy pass comes by."""

    name: ClassVar[str] = "drops-in-noise"
    observes: ClassVar[tuple[str, ...]] = ("denoise",)

    def observe(self, view, state):
        if len(view) > 6 and view.step.step:
            keep = torch.arange(len(view)).unsqueeze(0) < len(view) - 1
            asked = Retention(keep=keep)
            known = [x.flatten().tolist() for x in view._store.measured(asked)]
            view._store.apply(asked, iter(known), view.flight)


@dataclass(frozen=True)
class MovesInNoise(RetainPart):
    """Moves what it holds in noisy passes, past the cache's own eyes."""

    name: ClassVar[str] = "moves-in-noise"
    observes: ClassVar[tuple[str, ...]] = ("denoise",)

    def observe(self, view, state):
        for group in view._rows.groups:
            group.meta["time"] = group.meta["time"] + 0.5


@dataclass(frozen=True)
class IgnoresItsBudget(Window):
    """Has a budget and keeps all."""

    name: ClassVar[str] = "ignores-its-budget"

    def commit(self, views, state):
        return None


@dataclass(frozen=True)
class ReadsTooMuch(SelectPart):
    """Has a budget and reads one frame more."""

    name: ClassVar[str] = "reads-too-much"

    def pick(self, view, state):
        most = int(self.budget.frames(view)) + 1
        return Selection(frames=view.frames[-most:])


@dataclass(frozen=True)
class ForgetsItsSink(UnitPart):
    """Names a sink and protects nothing."""

    name: ClassVar[str] = "forgets-its-sink"
    sink: int = 2

    def protected(self, view, scores):
        return torch.zeros(1, 1, 1, dtype=torch.bool)


@dataclass(frozen=True)
class LosesAtAnyBudget(Longest):
    """Drops the first row even where there is room for all."""

    name: ClassVar[str] = "loses-at-any-budget"

    def keep(self, view, state):
        return Retention(keep=torch.arange(len(view)).unsqueeze(0) > 0)

    def commit(self, views, state):
        return [self.keep(view, state) for view in views]


@dataclass(frozen=True)
class ChunksOfThree(Longest):
    """Takes three frames for the newest chunk, whatever a chunk is."""

    name: ClassVar[str] = "chunks-of-three"

    def protected(self, view, scores):
        return view.frame_ids.view(1, 1, -1) > view.frames[-1] - 3


@dataclass(frozen=True)
class SixTokens(Longest):
    """Takes six tokens for a frame."""

    name: ClassVar[str] = "six-tokens"

    def scores(self, view, state):
        return view.keys("raw").norm(dim=-1).unflatten(1, (-1, 6)).sum(-1).unsqueeze(1)


@dataclass(frozen=True)
class DrawsAtRandom(SelectPart):
    """Draws from the generator that everybody shares."""

    name: ClassVar[str] = "draws-at-random"

    def scores(self, view: CacheView, state):
        return torch.rand(1, 1, len(view.frames))


@dataclass(frozen=True)
class SkipsItsChunk(SelectPart):
    """Reads memory and nothing of the chunk itself."""

    name: ClassVar[str] = "skips-its-chunk"

    def pick(self, view: PassView, state):
        if len(view):
            return Selection(current=torch.zeros(1, 1, view.query_frames, dtype=torch.bool))
        return None


@dataclass(frozen=True)
class HidesBytes(SelectPart):
    """Remembers keys where nobody counts them: in a function."""

    name: ClassVar[str] = "hides-bytes"

    def pick(self, view, state):
        own = view.own_keys().clone()
        state[view.layer] = lambda: own


@dataclass(frozen=True)
class RemembersTheLast(UnitPart):
    """Correct: remembers the queries of two passes."""

    name: ClassVar[str] = "remembers-the-last"
    observes: ClassVar[tuple[str, ...]] = ("commit",)

    def observe(self, view, state):
        state.setdefault(view.layer, deque(maxlen=2)).append(view.raw_query.clone())


@dataclass(frozen=True)
class NeverForgets(UnitPart):
    """Remembers the queries of every chunk."""

    name: ClassVar[str] = "never-forgets"
    observes: ClassVar[tuple[str, ...]] = ("commit",)

    def observe(self, view, state):
        state[view.layer, view.step.chunk] = view.raw_query.clone()


@dataclass(frozen=True)
class AsksTheHost(SelectPart):
    """Wants a number on the host in every pass."""

    name: ClassVar[str] = "asks-the-host"
    observes: ClassVar[tuple[str, ...]] = ("denoise", "commit")

    def observe(self, view, state):
        state["loudest"] = view.query.norm(dim=-1).max().item()


@dataclass(frozen=True)
class RenamesItsRows(Longest):
    """At an event its rows become those of frames to come."""

    name: ClassVar[str] = "renames-its-rows"

    def event(self, event, views, state):
        if event.kind != "start":
            for group in (group for view in views for group in view._rows.groups):
                group.meta["frame_id"] = group.meta["frame_id"] + 100


@dataclass(frozen=True)
class CountsItsQuestions(PositionsPart):
    """Moves rows by how often it was asked."""

    name: ClassVar[str] = "counts-its-questions"

    def lags(self, view, state, selection=None):
        state["asked"] = state.get("asked", 0) + 1
        return view.step.query_times[0] - view.time.unsqueeze(1) + 0.1 * state["asked"]


@dataclass(frozen=True)
class NotPlain(Longest):
    """A setting that no file can hold."""

    name: ClassVar[str] = "not-plain"
    scale: Any = torch.float32
