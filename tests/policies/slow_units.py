"""Retain parts that score rows by what the newest chunk looks at, said again in plain loops."""

from __future__ import annotations

import math
import statistics

from lightning_kv.testing import Script


def shares(stream, step, count):
    """Softmax shares that every row gets from evenly spaced queries of the final frames, a list."""
    asked = [query for query in stream.queries if query.frame in step.final]
    if count < len(asked):
        last = len(asked) - 1
        asked = [asked[round(i * last / max(1, count - 1))] for i in range(count)]
    before = [row for row in stream.rows if row.frame not in step.final]
    rows = before + stream.flight
    found = {(row.frame, row.place): [] for row in rows}
    keys = [stream.key(row) for row in rows]
    for query in asked:
        logits = [float(query.turned @ key) / math.sqrt(len(key)) for key in keys]
        own = [math.exp(x - max(logits)) for x in logits]
        for row, share in zip(rows, own, strict=True):
            found[row.frame, row.place].append(share / sum(own))
    return found


def mean_mass(stream, step, count):
    """Their means."""
    return {name: sum(own) / len(own) for name, own in shares(stream, step, count).items()}


def around(name, names, grid, side):
    """The names of rows (frame, place) at most ``side`` from a row's place, in all frames."""
    row, column = divmod(name[1], grid[1])
    places = [(*divmod(other[1], grid[1]), other) for other in names]
    return [o for r, c, o in places if abs(r - row) <= side and abs(c - column) <= side]


def near(name, names, grid, side):
    """Those in its own frame, itself included."""
    return [other for other in around(name, names, grid, side) if other[0] == name[0]]


class UnitScript(Script):
    """Keeps the sink, the newest chunk and the best units of a budget in rows of each head.

    Args:
        frames: Frames that a head may hold (those of tokens may be broken): one number, or a row
            per layer with one for each head.
        granularity: ``frame`` or ``token``.
        sink: First frames that stay.
        queries: Query rows that are asked.
    """

    def __init__(self, frames, granularity="frame", sink=0, queries=520):
        self.frames, self.granularity, self.sink, self.queries = frames, granularity, sink, queries
        self.evictions = {}

    def mass(self, stream, step):
        """What the newest chunk looks at."""
        return mean_mass(stream, step, self.queries)

    def values(self, stream, names, mass):
        """The score of each unit (a frame, or a row's frame and place); by the subclass."""
        raise NotImplementedError

    def commit(self, stream, step):
        """Drop the worst units."""
        table, tokens = self.frames, stream.geometry.tokens
        frames = table[stream.layer][stream.head] if isinstance(table, list) else table
        room = round(frames * tokens)
        if len(stream.rows) <= room:
            return
        names = [(row.frame, row.place) for row in stream.rows]
        value = self.values(stream, names, self.mass(stream, step))
        size = tokens if self.granularity == "frame" else 1

        def frame(unit):
            return unit if self.granularity == "frame" else unit[0]

        safe = [u for u in value if frame(u) < self.sink or frame(u) >= step.final[0]]
        rest = sorted((u for u in value if u not in safe), key=lambda u: (-value[u], u))
        kept = {*safe, *rest[: room // size - len(safe)]}
        stream.rows = [
            row
            for row in stream.rows
            if (row.frame if self.granularity == "frame" else (row.frame, row.place)) in kept
        ]
        where = (stream.namespace, stream.sample, stream.layer, stream.head)
        self.evictions[where] = self.evictions.get(where, 0) + 1


class SnapScript(UnitScript):
    """SnapKV: the mean mass of the rows that are there around a row."""

    def __init__(self, *settings, pool=3, **more):
        super().__init__(*settings, **more)
        self.pool = pool

    def values(self, stream, names, mass):
        grid, side = stream.geometry.grid, self.pool // 2
        rows = {
            name: statistics.fmean(mass[other] for other in near(name, names, grid, side))
            for name in names
        }
        return by_frame(rows) if self.granularity == "frame" else rows


def ragged(frames, *shares):
    """A budget with a share for each head, a row per layer; and the frames that it allows."""
    budget = {"part": "table", "amount": f"{frames}f", "shares": [list(row) for row in shares]}
    return budget, [[round(share * frames) for share in row] for row in shares]


RAGGED = ragged(4, (1, 0.75, 1.5, 0.8), (0.75, 1, 1, 1.2))


def by_frame(rows):
    """Sums ``{frame: value}`` of ``{(frame, place): value}``."""
    found = {}
    for (frame, _), value in rows.items():
        found[frame] = found.get(frame, 0.0) + value
    return found
