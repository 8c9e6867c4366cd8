"""What recorders and the oracle say in tensors, said again in loops over rows and queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from slow import sessions, turn

from lightning_kv.cache.recorder import Clip
from lightning_kv.testing import chunked


@dataclass
class Met:
    """One pass of one head: its queries, and all rows they meet."""

    step: Any
    place: tuple  # sample, namespace, layer, head
    queries: list  # (frame, vector as rotated)
    rows: list
    held: int
    time: Any = None
    extra: Any = None

    def mass(self, index):
        """Softmax of one query over every row."""
        frame, query = self.queries[index]
        logits = []
        for number, row in enumerate(self.rows):
            key = row.key
            if self.time and number < self.held:
                key = row.at(self.time(row.frame, frame, self.place[3]))
            logit = float(query @ key) / math.sqrt(len(query))
            if self.extra and number < self.held:
                logit += self.extra(row.frame, self.step.start)
            logits.append(logit)
        top = max(logits)
        parts = [math.exp(x - top) for x in logits]
        return [p / sum(parts) for p in parts]


@dataclass
class Row:
    """A row with its key before rotation, and as rotated at its own time."""

    frame: int
    place: int
    k: torch.Tensor
    v: torch.Tensor
    turned: dict = field(default_factory=dict)

    @property
    def key(self):
        """At its own time."""
        return self.at(self.frame)

    def at(self, time):
        """The key at a time; turned once."""
        if time not in self.turned:
            self.turned[time] = turn(self.k, time, self.place)
        return self.turned[time]


def met(recorded, stays=None, time=None, extra=None):
    """Every pass of every head of a tape, one after the other.

    ``stays(frame, place, head, layer)`` says which rows outlive their commit; ``time`` where a
    past row is met and ``extra`` what is added to its logit.
    """
    past, tokens = {}, sessions.GEOMETRY.tokens
    for step, layer, q, k, v in recorded:
        for b in range(len(q)):
            for h in range(sessions.GEOMETRY.heads):
                own = past.setdefault((b, step.namespace, layer, h), [])
                spots = [
                    (i * tokens + p, f, p) for i, f in enumerate(step.frames) for p in range(tokens)
                ]
                flight = [Row(f, p, k[b, i, h], v[b, i, h].double()) for i, f, p in spots]
                queries = [(f, turn(q[b, i, h], f, p)) for i, f, p in spots]
                place = (b, step.namespace, layer, h)
                yield Met(step, place, queries, [*own, *flight], len(own), time, extra)
                for row in flight:
                    if row.frame in step.final:
                        own.append(row)
                if step.final and stays:
                    own[:] = [row for row in own if stays(row.frame, row.place, h, layer)]


def sampled(count, most):
    """Evenly spaced queries from the first to the last, or all."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def masses(recorded, queries=10**6, **how):
    """Mean mass by (sample, namespace, chunk, layer, head), of every (frame, place)."""
    sums, weights = {}, {}
    for one in met(recorded, **how):
        b, namespace, layer, h = one.place
        where = (b, namespace, one.step.chunk, layer, h)
        weight = 0.5 if one.step.phase == "commit" else 1.0
        weights[where] = weights.get(where, 0.0) + weight
        chosen = sampled(len(one.queries), queries)
        total = sums.setdefault(where, {})
        for index in chosen:
            for row, share in zip(one.rows, one.mass(index), strict=True):
                spot = (row.frame, row.place)
                total[spot] = total.get(spot, 0.0) + weight * share / len(chosen)
    return {
        where: {spot: x / weights[where] for spot, x in total.items()}
        for where, total in sums.items()
    }


def by_frame(spots):
    """The same of every frame."""
    found = {}
    for (frame, _), share in spots.items():
        found[frame] = found.get(frame, 0.0) + share
    return found


def asked(step, count, queries, passes):
    """Which queries of a pass the recorder of outputs takes: others in each pass of a chunk."""
    rows = min(queries, count)
    turn_ = step.step if step.phase == "denoise" else passes - 1
    return [(r * count // rows + turn_ * count // (rows * passes)) % count for r in range(rows)]


def given(chunks, first=2):
    """A rollout whose first chunks are given: each of them in one pass."""
    return chunked([sessions.CHUNK] * chunks, context=first)


@dataclass
class Asked:
    """One query: what it counts in its chunk, and every row it meets."""

    weight: float
    frames: np.ndarray
    mass: np.ndarray
    values: np.ndarray

    def over(self, keep=None):
        """Attention output where only some frames are seen, by default all."""
        some = np.full(len(self.frames), True) if keep is None else np.isin(self.frames, [*keep])
        return self.mass[some] @ self.values[some] / self.mass[some].sum()


def outputs(recorded, queries, passes, **how):
    """Of every (sample, namespace, chunk, layer, head): the queries that are asked."""
    found = {}
    for one in met(recorded, **how):
        b, namespace, layer, h = one.place
        where = (b, namespace, one.step.chunk, layer, h)
        frames = np.array([row.frame for row in one.rows])
        values = torch.stack([row.v for row in one.rows]).numpy()
        for index in asked(one.step, len(one.queries), queries, passes):
            weight = 0.5 if one.step.phase == "commit" else 1.0
            query = Asked(weight, frames, np.array(one.mass(index)), values)
            found.setdefault(where, []).append(query)
    return found


def loss_of(kept, seen, made, discount):
    """Error of the outputs of coming chunks where only some of the frames made so far are kept.

    ``seen`` holds what :func:`outputs` gives for each coming chunk, the nearest first.
    """
    total = 0.0
    for ahead, queries in enumerate(seen):
        weights = sum(query.weight for query in queries)
        for query in queries:
            left = kept | {f for f in query.frames.tolist() if f >= made}
            error = query.over(left) - query.over()
            total += discount**ahead * query.weight / weights * float(error @ error)
    return total


def greedy(frames, guard, seen, made, discount, steps):
    """Frames in the order in which they are wanted: the next is the one that helps most."""
    kept, order = set(guard), []
    while len(order) < steps and len(kept) < len(frames):
        losses = {f: loss_of(kept | {f}, seen, made, discount) for f in frames if f not in kept}
        order.append(min(losses, key=lambda f: (losses[f], f)))
        kept.add(order[-1])
    return order


def mass_to_come(found, where, chunks, discount):
    """Discounted mass of every frame in coming chunks, the nearest first."""
    b, namespace, layer, h = where
    total = {}
    for ahead, chunk in enumerate(chunks):
        for frame, share in by_frame(found[b, namespace, chunk, layer, h]).items():
            total[frame] = total.get(frame, 0.0) + discount**ahead * share
    return total


def clips(recorded, batch=1, seeds=None, **changes):
    """Of the samples of a tape."""
    frames = max(step.frames[-1] for step, *_ in recorded) + 1
    chunks = max(step.chunk for step, *_ in recorded) + 1
    most = {}
    for step, layer, *_ in recorded:
        if not layer:
            where = (step.namespace, step.chunk)
            most[where] = most.get(where, 0) + 1
    geometry = changes.pop("geometry", sessions.GEOMETRY)
    about = (frames, chunks, geometry, max(most.values()))
    return [Clip(f"k{i}", i, *about, **changes) for i in range(batch)]
