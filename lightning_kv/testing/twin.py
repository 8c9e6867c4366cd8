"""A slow and obvious twin of the cache: lists of rows, loops, complex numbers, one query at a time.

It shares no code with the cache but the plain data of a pass. A script says in plain Python, stream
by stream, what the parts under test say in tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.cache.passes import CONDITIONAL, Geometry, Pass

Place = int | tuple[float, float]
"""A token's number in raster order, or its row and column, which may lie between tokens."""


def spot(geometry: Geometry, place: Place) -> tuple[float, float]:
    """Row and column of a place."""
    return place if isinstance(place, tuple) else divmod(int(place), geometry.grid[1])


def turn(
    geometry: Geometry, vector: Tensor, time: float, place: Place, sign: float = 1.0
) -> Tensor:
    """Rotary embedding of one vector, pair by pair; ``sign=-1`` turns it back."""
    pairs = torch.view_as_complex(vector.double().reshape(-1, 2).contiguous())
    return torch.view_as_real(pairs * _turns(geometry, time, place, sign)).flatten()


@lru_cache(maxsize=4096)  # every row is met by many queries
def _turns(geometry: Geometry, time: float, place: Place, sign: float) -> Tensor:
    """What the pairs of a vector are multiplied with."""
    side = 2 * (geometry.head_dim // 6)
    widths = (geometry.head_dim - 2 * side, side, side)
    angles = [
        sign * position * theta ** (-2 * pair / width)
        for position, width, theta in zip(
            (time, *spot(geometry, place)), widths, geometry.rotary.theta, strict=True
        )
        for pair in range(width // 2)
    ]
    return torch.exp(1j * torch.tensor(angles, dtype=torch.float64))


@dataclass
class Row:
    """One row of one stream.

    Args:
        frame: The frame it counts for.
        time: Its rotary time.
        place: Where it lies in the frame.
        k: Key before rotation.
        v: Value.
        weight: Tokens that it stands for.
        columns: Numbers by name.
    """

    frame: int
    time: float
    place: Place
    k: Tensor
    v: Tensor
    weight: float = 1.0
    columns: dict[str, float] = field(default_factory=dict)

    def clone(self, **changes: Any) -> Row:
        """A copy with some fields changed."""
        return replace(self, **{"columns": dict(self.columns), **changes})


@dataclass(frozen=True)
class Query:
    """One query of one stream: its frame, rotary time and place, before and after rotation."""

    frame: int
    time: float
    place: int
    raw: Tensor
    turned: Tensor


@dataclass
class Stream:
    """One head of one layer of one sample in one namespace.

    Args:
        geometry: Sizes of the model.
        sample: Index of the sample.
        layer: Index of the layer.
        head: Index of the head.
        namespace: ``cond``, or ``uncond`` under guidance.
        rows: Memory.
        archive: Rows held aside.
        queries: Those of the pass that is running, or has just ended.
        flight: Rows of the frames in flight, alike.
    """

    geometry: Geometry
    sample: int
    layer: int
    head: int
    namespace: str = CONDITIONAL
    rows: list[Row] = field(default_factory=list)
    archive: list[Row] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    flight: list[Row] = field(default_factory=list)

    def turn(self, vector: Tensor, time: float, place: Place, sign: float = 1.0) -> Tensor:
        """See :func:`turn`."""
        return turn(self.geometry, vector, time, place, sign)

    def key(self, row: Row) -> Tensor:
        """A row's key after rotation, at its recorded time."""
        return self.turn(row.k, row.time, row.place)

    def logits(self, query: Query, rows: Sequence[Row]) -> list[float]:
        """What the softmax of a query over rows is taken of."""
        width = math.sqrt(self.geometry.head_dim)
        return [float(query.turned @ self.key(row)) / width for row in rows]


class Script:
    """What the twin does at each question; by default everything is kept and read.

    Hooks change ``stream.rows`` and ``stream.archive`` as they like. ``q`` and ``k`` are those of
    the pass before rotation ``[T, D]``; ``stream.queries`` and ``stream.flight`` say the same with
    frames and places, in every hook from :meth:`open` to :meth:`commit_all`.
    """

    def event(self, event: Event, streams: list[Stream], step: Pass) -> Rebuild | None:
        """Something happens before a pass; all streams of one sample in one namespace."""

    def open(self, stream: Stream, step: Pass, q: Tensor) -> None:
        """In the first pass of a chunk, before attention."""

    def closing(self, stream: Stream, step: Pass, q: Tensor) -> None:
        """In a pass that makes frames final, before attention."""

    def look(self, stream: Stream, step: Pass, q: Tensor, k: Tensor) -> None:
        """In every pass, before attention."""

    def open_all(self, streams: list[Stream], step: Pass) -> None:
        """In the first pass of a chunk: all heads of one layer, after the hooks above of each."""

    def gathered(self, streams: list[Stream], step: Pass) -> None:
        """Final rows are in memory, and no stream of the sample has decided yet."""

    def commit(self, stream: Stream, step: Pass) -> None:
        """After a pass that has made frames final."""

    def commit_all(self, streams: list[Stream], step: Pass) -> Rebuild | None:
        """The same once for all streams of a sample, after :meth:`commit` of each."""

    def reads(
        self, stream: Stream, step: Pass, frame: int, index: int, row: Row, current: bool
    ) -> bool:
        """Whether a query frame reads a row (number ``index``); ``current`` ones are in flight."""
        return True

    def time(self, stream: Stream, step: Pass, row: Row) -> float:
        """The rotary time at which a held row is read."""
        return row.time

    def time_for(self, stream: Stream, step: Pass, row: Row, frame: int) -> float:
        """The time at which one query frame meets a row, where query frames differ."""
        return self.time(stream, step, row)

    def bias(self, stream: Stream, step: Pass, frame: int, index: int, row: Row) -> float:
        """What is added to a logit."""
        return 0.0

    def fresh(self, row: Row) -> Row:
        """A row that becomes final, as it enters memory."""
        return row


class Twin:
    """Memory of a rollout as lists; it is called as a session is.

    Args:
        geometry: Sizes of the model.
        batch: Number of samples.
        script: What it does.
    """

    def __init__(self, geometry: Geometry, batch: int, script: Script) -> None:
        self.geometry, self.batch, self.script = geometry, batch, script
        self.branches: dict[str, dict[tuple[int, int, int], Stream]] = {}
        self.seen: dict[tuple[Any, ...], set[tuple[float, ...]]] | None = None

    @property
    def streams(self) -> dict[tuple[int, int, int], Stream]:
        """Those of the leading namespace by sample, layer and head."""
        return self.branch(CONDITIONAL)

    def branch(self, namespace: str) -> dict[tuple[int, int, int], Stream]:
        """The streams of one namespace by sample, layer and head."""
        if namespace not in self.branches:
            of = self.geometry
            self.branches[namespace] = {
                (sample, layer, head): Stream(of, sample, layer, head, namespace)
                for sample in range(self.batch)
                for layer in range(of.layers)
                for head in range(of.heads)
            }
        return self.branches[namespace]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention of one layer, float64 ``[B, T, H, D]``."""
        out = torch.empty(q.shape, dtype=torch.float64)
        for b, sample in enumerate(self._chosen(step)):
            branch, heads = self.branch(step.namespace), range(self.geometry.heads)
            streams = [branch[sample, layer, head] for head in heads]
            met = [
                self._met(stream, *(x[b, :, head] for x in (q, k, v)), step)
                for head, stream in enumerate(streams)
            ]
            if step.mode != "scratch" and step.opens and not step.rebuild:
                self.script.open_all(streams, step)
            for head, (stream, own) in enumerate(zip(streams, met, strict=True)):
                out[b, :, head] = self._one(stream, *own, step)
        return out

    def finish(self, step: Pass) -> list[tuple[int, Rebuild]]:
        """Close a pass: rows of all streams become final before any of them decides."""
        if step.mode == "scratch" or not step.final:
            return []
        answers = []
        for sample in self._chosen(step):
            streams = self.of(sample, step.namespace)
            for stream in streams:
                final = [row for row in stream.flight if row.frame in step.final]
                stream.rows += [self.script.fresh(row) for row in final]
            if step.rebuild:
                continue
            self.script.gathered(streams, step)
            for stream in streams:
                self.script.commit(stream, step)
            answers.append((sample, self.script.commit_all(streams, step)))
        return [(sample, answer) for sample, answer in answers if answer is not None]

    def event(self, event: Event, step: Pass) -> list[tuple[str, int, Rebuild]]:
        """Tell every sample in every namespace of an event before a pass."""
        answers = [
            (name, sample, self.script.event(event, self.of(sample, name), step))
            for name in self.branches
            for sample in range(self.batch)
        ]
        return [found for found in answers if found[2] is not None]

    def clear(self, sample: int, namespace: str, spare: Sequence[int] = ()) -> list[list[Row]]:
        """Forget one sample's rows before a rebuild; those of spared frames are given back."""
        aside = []
        for stream in self.of(sample, namespace):
            aside.append([row for row in stream.rows if row.frame in spare])
            stream.rows, stream.archive = [], []
        return aside

    def rebuilt(
        self, sample: int, step: Pass, hold: Sequence[int] | None, aside: list[list[Row]]
    ) -> None:
        """Close a rebuild: only ``hold`` stays of its frames, behind the rows put aside."""
        for stream, saved in zip(self.of(sample, step.namespace), aside, strict=True):
            stream.rows = saved + [r for r in stream.rows if hold is None or r.frame in hold]

    def of(self, sample: int, namespace: str = CONDITIONAL) -> list[Stream]:
        """All streams of one sample."""
        return [stream for stream in self.branch(namespace).values() if stream.sample == sample]

    def _chosen(self, step: Pass) -> Sequence[int]:
        return range(self.batch) if step.samples is None else step.samples

    def _met(
        self, stream: Stream, q: Tensor, k: Tensor, v: Tensor, step: Pass
    ) -> tuple[list[Query], list[Row]]:
        """Queries and rows in flight of one stream, once the script has seen them."""
        tokens, script = self.geometry.tokens, self.script
        at = [(step.frames[i // tokens], step.query_times[i // tokens]) for i in range(len(q))]
        at = [(frame, time, i % tokens) for i, (frame, time) in enumerate(at)]
        queries = [Query(*own, x, stream.turn(x, *own[1:])) for own, x in zip(at, q, strict=True)]
        flight = [Row(*own, x, y) for own, x, y in zip(at, k, v, strict=True)]
        if step.mode != "scratch":
            stream.queries, stream.flight = queries, flight
            if step.opens and not step.rebuild:
                script.open(stream, step, q)
            if step.final and not step.rebuild:
                script.closing(stream, step, q)
            script.look(stream, step, q, k)
        return queries, flight

    def _one(self, stream: Stream, queries: list[Query], flight: list[Row], step: Pass) -> Tensor:
        """One stream in one pass ``[T, D]``."""
        script = self.script
        now, out, past = [stream.key(row) for row in flight], [], {}
        for query in queries:
            if query.frame not in past:
                times = [script.time_for(stream, step, row, query.frame) for row in stream.rows]
                past[query.frame] = [
                    stream.turn(r.k, t, r.place) for r, t in zip(stream.rows, times, strict=True)
                ]
            out.append(self._read(stream, step, query, flight, past[query.frame] + now))
        return torch.stack(out)

    def _read(
        self, stream: Stream, step: Pass, query: Query, flight: list[Row], keys: list[Tensor]
    ) -> Tensor:
        """What one query reads: a softmax over the rows that its frame may read."""
        extra, read, values = [], [], []
        for index, (row, key) in enumerate(zip(stream.rows + flight, keys, strict=True)):
            asked = (stream, step, query.frame, index, row)
            held = index < len(stream.rows)
            if not (step.rebuild or self.script.reads(*asked, not held)):
                continue
            extra.append(self.script.bias(*asked))
            read.append(key)
            values.append(row.v)
            if held and self.seen is not None:
                self._note(stream, step, query, row)
        products = (torch.stack(read) @ query.turned).tolist()
        width = math.sqrt(len(query.turned))
        logits = [x / width + more for x, more in zip(products, extra, strict=True)]
        top = max(logits)
        share = [math.exp(x - top) for x in logits]
        weights = torch.tensor(share, dtype=torch.float64) / sum(share)
        return weights @ torch.stack(values).double()

    def _note(self, stream: Stream, step: Pass, query: Query, row: Row) -> None:
        where = (stream.namespace, stream.sample, stream.layer, stream.head)
        when = (step.chunk, step.phase, step.step, step.start, query.frame)
        found = self.seen.setdefault((*where, *when), set())
        found.add((row.frame, *map(float, spot(self.geometry, row.place))))
