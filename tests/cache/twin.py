"""A slow and obvious twin of the cache: lists of rows, loops, complex numbers, one query at a time.

It shares no code with the package but the plain data of a pass. A script says in plain Python what
the part under test says in tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import Rotary

GEOMETRY = Geometry(layers=2, heads=3, head_dim=12, grid=(2, 2), rotary=Rotary(12), train_horizon=8)
CHUNK = 2


def spot(place):
    """Row and column of a place: a token's number in raster order, or the pair itself."""
    return place if isinstance(place, tuple) else divmod(int(place), GEOMETRY.grid[1])


def turn(vector, time, place, sign=1.0):
    """Rotary embedding of one vector, pair by pair; places may lie between tokens."""
    row, column = spot(place)
    out = []
    pairs = torch.view_as_complex(vector.double().reshape(-1, 2).contiguous())
    for position in (time, row, column):
        for j in range(2):  # 4 real dimensions for each axis at head width 12
            out.append(sign * position * 10000.0 ** (-2 * j / 4))
    angles = torch.tensor(out, dtype=torch.float64)
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten()


@dataclass
class Row:
    frame: int
    time: float
    place: int | tuple  # number in raster order, or row and column
    k: torch.Tensor  # before rotation
    v: torch.Tensor
    weight: float = 1.0
    columns: dict = field(default_factory=dict)

    def clone(self, **changes):
        return Row(**{**self.__dict__, "columns": dict(self.columns), **changes})


@dataclass
class Stream:
    sample: int
    layer: int
    head: int
    rows: list = field(default_factory=list)
    archive: list = field(default_factory=list)


class Script:
    """What the twin does at each question; everything by default."""

    def open(self, stream, step, q):
        pass

    def closing(self, stream, step, q):
        pass

    def commit(self, stream, step):
        pass

    def reads(self, stream, step, frame, index, row, current):
        return True

    def time(self, stream, step, row):
        return row.time

    def time_for(self, stream, step, row, frame):
        """The time at which one query frame meets a row, where query frames differ."""
        return self.time(stream, step, row)

    def bias(self, stream, step, frame, index, row):
        return 0.0

    def fresh(self, row):
        return row


class Twin:
    """Same calls as the session."""

    def __init__(self, batch, script):
        self.script = script
        self.streams = {
            (b, layer, h): Stream(b, layer, h)
            for b in range(batch)
            for layer in range(GEOMETRY.layers)
            for h in range(GEOMETRY.heads)
        }
        self.flight = {}

    def attend(self, layer, q, k, v, step):
        out = torch.empty(q.shape, dtype=torch.float64)
        for b, sample in enumerate(range(len(q)) if step.samples is None else step.samples):
            for h in range(GEOMETRY.heads):
                stream = self.streams[sample, layer, h]
                if step.opens and step.mode != "scratch":
                    self.script.open(stream, step, q[b, :, h])
                if step.final and step.mode != "scratch":
                    self.script.closing(stream, step, q[b, :, h])
                out[b, :, h] = self._one(stream, q[b, :, h], k[b, :, h], v[b, :, h], step)
        return out

    def _one(self, stream, q, k, v, step):
        tokens = GEOMETRY.tokens
        flight = [
            Row(step.frames[i // tokens], step.query_times[i // tokens], i % tokens, k[i], v[i])
            for i in range(len(k))
        ]
        if step.mode != "scratch":
            self.flight[stream.sample, stream.layer, stream.head] = flight
        past = {
            frame: [
                turn(r.k, self.script.time_for(stream, step, r, frame), r.place)
                for r in stream.rows
            ]
            for frame in step.frames
        }
        now = [turn(r.k, r.time, r.place) for r in flight]
        out = []
        for i in range(len(q)):
            frame = step.frames[i // tokens]
            query = turn(q[i], step.query_times[i // tokens], i % tokens)
            logits, values = [], []
            keys = past[frame] + now
            for index, (row, key) in enumerate(zip(stream.rows + flight, keys, strict=True)):
                current = index >= len(stream.rows)
                if self.script.reads(stream, step, frame, index, row, current):
                    extra = self.script.bias(stream, step, frame, index, row)
                    logits.append(float(query @ key) / math.sqrt(len(query)) + extra)
                    values.append(row.v.double())
            top = max(logits)
            share = [math.exp(x - top) for x in logits]
            out.append(sum(s * x for s, x in zip(share, values, strict=True)) / sum(share))
        return torch.stack(out)

    def finish(self, step):
        if step.mode == "scratch":
            return
        for key, stream in self.streams.items():
            if step.final:
                kept = [r for r in self.flight[key] if r.frame in step.final]
                stream.rows += [self.script.fresh(r) for r in kept]
                self.script.commit(stream, step)


def passes(chunks=5, noisy=2):
    """The passes of a small rollout."""
    for chunk in range(chunks):
        frames = tuple(range(chunk * CHUNK, (chunk + 1) * CHUNK))
        after = CHUNK if chunk + 1 < chunks else 0
        for step in range(noisy):
            yield Pass("denoise", frames, (500.0,) * CHUNK, chunk, step, (), step == 0, after)
        yield Pass("commit", frames, (0.0,) * CHUNK, chunk, 0, frames, False, after)


def drive(session, steps, batch=2, seed=0, check=None, dtype=torch.float32):
    """Run random queries, keys and values through a session; all its outputs, in order."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for step in steps:
        shape = (batch, len(step.frames) * GEOMETRY.tokens, GEOMETRY.heads, GEOMETRY.head_dim)
        for layer in range(GEOMETRY.layers):
            q, k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(3))
            out.append(session.attend(layer, q, k, v, step).double())
        if check:
            check(step)
        session.finish(step)
    return out
