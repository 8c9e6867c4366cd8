"""What policy parts say in tensors, said again in plain Python; and ways to look into a session.

Rows are those of the slow twin of the cache. The rules and the arithmetic share no code with the
package; the helpers that look into a session do.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
import sessions
from sessions import (
    STORAGE,
    assert_same_outputs,
    assert_same_rows,
    passes,
    play,
    policy,
    rolling,
    tape,
    turn,
)
from sessions import session_of as session

from lightning_kv.cache.decisions import Retention
from lightning_kv.policies.base import RetainPart, SelectPart
from lightning_kv.testing import Script, Twin

__all__ = ["STORAGE", "assert_same_rows", "passes", "play", "policy", "rolling", "tape", "turn"]


def world(monkeypatch, grid=(2, 2), chunk=2, known=False):
    """Let sessions and all that is here work on another grid and chunk.

    Where ``known``, the geometry says how long a chunk is.
    """
    own = {"grid": grid, "chunk": chunk if known else 0}
    monkeypatch.setattr(sessions, "GEOMETRY", replace(sessions.GEOMETRY, **own))
    monkeypatch.setattr(sessions, "CHUNK", chunk)


def stores(on, sample=0, namespace="cond"):
    """What a session holds of one sample, layer by layer."""
    return on.samples[sample].stores[namespace]


def field(store, name, head):
    """A field or column of one head's rows, in their order."""
    (group,) = (g for g in store.memory.groups if head in g.heads)
    own = group.meta[name]
    return own[group.heads.index(head) if len(own) > 1 else 0]


def payload(store, name, head):
    """Keys (``k``) or values (``v``) of one head's rows as they are stored."""
    (group,) = (g for g in store.memory.groups if head in g.heads)
    return group.payload(name)[group.heads.index(head)]


def raster(places):
    """Numbers of the tokens at places ``[n, 2]``; every one must be a whole one."""
    rows = [(float(row), float(column)) for row, column in places]
    assert all(x.is_integer() for pair in rows for x in pair)
    return [int(row) * sessions.GEOMETRY.grid[1] + int(column) for row, column in rows]


# -- looking at the package ------------------------------------------------------------------


@dataclass(frozen=True)
class Ask(SelectPart):
    """Reads what a function of every pass's view says: everything, unless it gives a selection."""

    refresh: str = "pass"
    question: Any = None

    def pick(self, view, state):
        """What the question answers."""
        return self.question(view)


@dataclass(frozen=True)
class AskAtCommit(RetainPart):
    """Shows the views at every commit to a function, whose answer it gives."""

    question: Any = None

    def commit(self, views, state):
        """The answer of the question, or nothing."""
        return self.question(views)


@dataclass(frozen=True)
class Scattered(RetainPart):
    """Keeps rows that look random, other ones and another number of them in every head."""

    share: float = 0.6

    def commit(self, views, state):
        """Rows by a hash of frame, place, head and layer."""
        out = []
        for view in views:
            keep = torch.zeros(view.heads, len(view), dtype=torch.bool)
            for h in range(view.heads):
                for i, row in enumerate(held(view, h)):
                    keep[h, i] = self.stays(row["frame_id"], row["place"], h, view.layer)
            out.append(Retention(keep=keep))
        return out

    def stays(self, frame, place, head, layer):
        """Whether a row stays."""
        return (frame * 37 + place * 11 + head * 5 + layer * 3) % 10 < 10 * self.share


class Watching(Script):
    """A script that notes the frames that each layer holds in any head, as memory changes."""

    frames: ClassVar[dict] = {}

    def gathered(self, streams, step):
        """Before any stream decides."""
        self.settle(streams)

    def commit_all(self, streams, step):
        """Once all have decided."""
        self.settle(streams)

    def settle(self, streams):
        """Note them for one sample."""
        self.frames = dict(self.frames)
        for layer in {stream.layer for stream in streams}:
            own = {r.frame for s in streams if s.layer == layer for r in s.rows}
            self.frames[streams[0].sample, layer] = own


def line(values, head):
    """One head's line of values ``[1 or H, ...]``."""
    return values[head if len(values) > 1 else 0]


def held(view, head):
    """Rows of one head as a view shows them: dictionaries, with keys as they are read.

    ``raw`` are the stored keys, turned back here where they are held rotated.
    """
    store, found = view._store, []
    keys, values = view.keys("read")[head].double(), view.values()[head].double()
    own = {name: line(view.field(name), head).tolist() for name in ("frame_id", "time", "weight")}
    places = raster(line(view.place, head)[: view.lengths[head]])
    stored = payload(store, "k", head).double()
    for i, place in enumerate(places):
        row = {name: column[i] for name, column in own.items()}
        row |= {"place": place, "key": keys[i], "v": values[i], "stored": stored[i]}
        row["raw"] = turn(stored[i], row["time"], place, sign=-1) if store.rotated else stored[i]
        found.append(row)
    return found


def agree(made, script, recorded, batch=1, tolerance=5e-5, event=None, **settings):
    """Assert that session and twin give the same outputs and hold the same rows; returns both."""
    on, slow_twin = session(made, batch, **settings), Twin(sessions.GEOMETRY, batch, script)
    assert_same_outputs(on, slow_twin, recorded, tolerance, event)
    assert_same_rows(on, slow_twin)
    return on, slow_twin


# -- arithmetic ------------------------------------------------------------------------------


def softmax(logits):
    """Shares that add up to 1."""
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [p / sum(parts) for p in parts]


def zscores(values):
    """Minus the mean, over the population standard deviation; zeros where all are alike."""
    middle, spread = statistics.fmean(values), statistics.pstdev(values)
    if spread <= 1e-6 * max(map(abs, values)):
        return [0.0] * len(values)
    return [(x - middle) / spread for x in values]


def pools(rows, tokens, groups, share):
    """The pooled vector of every run of tokens that has rows; ``rows`` are (place, vector)."""
    found = {}
    for place, vector in rows:
        found.setdefault(place * groups // tokens, []).append(vector)
    return [
        share * sum(own) / len(own) + (1 - share) * torch.stack(own).max(0).values
        for own in found.values()
    ]


def pooled_logit(queries, keys):
    """Mean logit of all pairs of pooled vectors."""
    total = sum(float(q @ k) for q in queries for k in keys)
    return total / (len(queries) * len(keys)) / math.sqrt(len(keys[0]))


def mean_lse(queries, keys, weights=None):
    """Mean over queries of the log of the sum of exponentials of their logits, times weights."""
    width, weights = math.sqrt(len(keys[0])), weights or [1.0] * len(keys)
    each = list(zip(keys, weights, strict=True))
    return statistics.fmean(
        math.log(sum(w * math.exp(float(q @ k) / width) for k, w in each)) for q in queries
    )


def unlikeness(frames):
    """Minus the mean cosine with the mean key of the place, of frames ``{frame: {place: key}}``."""
    places = {p for rows in frames.values() for p in rows}
    mean = {}
    for p in places:
        there = [rows[p] for rows in frames.values() if p in rows]
        mean[p] = sum(there) / len(there)
    return {
        f: -statistics.fmean(
            float(k @ mean[p]) / math.sqrt(float(k @ k) * float(mean[p] @ mean[p]))
            for p, k in rows.items()
        )
        for f, rows in frames.items()
    }


def best_of(scores, count):
    """The ``count`` best of ``{name: score}``, the earlier of equals."""
    return sorted(scores, key=lambda f: (-scores[f], f))[:count]


def filling(names, sizes, room):
    """The first names whose sizes together fit into some room."""
    found, taken = [], 0.0
    for name in names:
        taken += sizes[name]
        if taken > room + 1e-6:
            break
        found.append(name)
    return found


# -- focused reading -------------------------------------------------------------------------


@dataclass
class FocusedRule:
    """The settings of a focused selection, in history frames."""

    budget: int
    score: str = "logit"
    attention_weight: float = 0.5
    groups: int | None = None
    mean_share: float = 0.5
    per_query_frame: bool = True
    anchors: int = 3
    standardise: str = "history"
    start: int = 0
    refresh: str = "pass"
    log_weight: bool = False

    def settings(self):
        """The same for the part."""
        own = {k: v for k, v in self.__dict__.items() if k != "log_weight"}
        return {"part": "focused", **own, "budget": f"{self.budget}f"}


def tokens_of(step, q):
    """Turned queries or keys of a pass, ``{frame: [(place, vector)]}``."""
    found = {}
    for i, x in enumerate(q):
        frame, place = step.frames[i // sessions.GEOMETRY.tokens], i % sessions.GEOMETRY.tokens
        time = step.query_times[i // sessions.GEOMETRY.tokens]
        found.setdefault(frame, []).append((place, turn(x, time, place)))
    return found


def past_of(rows):
    """Turned keys of rows, ``{frame: [(place, vector)]}``, frames ascending."""
    found = {}
    for r in sorted(rows, key=lambda r: r.frame):
        found.setdefault(r.frame, []).append((r.place, turn(r.k, r.time, r.place)))
    return found


def attention_scores(rule, past, asked, flight, weight):
    """The attention score of every past frame, for one set of queries ``{frame: rows}``."""
    tokens, groups = sessions.GEOMETRY.tokens, rule.groups or sessions.GEOMETRY.grid[0]
    queries = [x for rows in asked.values() for _, x in rows]
    if rule.score == "lse":
        return {
            f: mean_lse(queries, [k for _, k in rows], [weight.get((f, p), 1.0) for p, _ in rows])
            for f, rows in past.items()
        }
    if rule.score == "mass":
        keys = [
            (f, k, weight.get((f, p), 1.0)) for f, rows in (past | flight).items() for p, k in rows
        ]
        total = dict.fromkeys(past, 0.0)
        for q in queries:
            shares = softmax([float(q @ k) / math.sqrt(len(k)) + math.log(w) for _, k, w in keys])
            for (f, *_), share in zip(keys, shares, strict=True):
                if f in past:
                    total[f] += share
        return total
    pooled = {f: pools(rows, tokens, groups, rule.mean_share) for f, rows in past.items()}
    each = [pools(rows, tokens, groups, rule.mean_share) for rows in asked.values()]
    return {
        f: statistics.fmean(pooled_logit(own, keys) for own in each) for f, keys in pooled.items()
    }


def focused_frames(rule, rows, q, k, step):
    """Which past frames each query frame reads: ``{query frame: [frames]}``."""
    past, asked, flight = past_of(rows), tokens_of(step, q), tokens_of(step, k)
    weight = {(r.frame, r.place): r.weight for r in rows} if rule.log_weight else {}
    sizes = {f: len(own) / sessions.GEOMETRY.tokens for f, own in past.items()}
    if step.chunk < rule.start or sum(sizes.values()) <= rule.budget:
        return {f: list(past) for f in step.frames}
    every = past | flight if rule.standardise == "all" else past
    unlike = unlikeness({f: dict(own) for f, own in every.items()})
    unlike = dict(zip(every, zscores(list(unlike.values())), strict=True))
    found = {}
    for frame in step.frames:
        own = {frame: asked[frame]} if rule.per_query_frame else asked
        scores = attention_scores(rule, every, own, flight, weight)
        looked = dict(zip(every, zscores(list(scores.values())), strict=True))
        w = rule.attention_weight
        total = {f: w * looked[f] + (1 - w) * unlike[f] for f in past}
        anchor = best_of({f: total[f] for f in list(past)[: rule.anchors]}, 1)
        rest = best_of({f: x for f, x in total.items() if f not in anchor}, len(total))
        room = rule.budget - sum(sizes[f] for f in anchor)
        found[frame] = sorted(anchor + filling(rest, sizes, room))
    return found


class FocusedScript(Script):
    """Focused reading for the twin."""

    def __init__(self, rule):
        self.rule, self.kept = rule, {}

    def look(self, stream, step, q, k):
        """Choose for this pass, or keep what the chunk's first pass chose."""
        if self.rule.refresh == "pass" or step.opens:
            self.kept[id(stream)] = focused_frames(self.rule, stream.rows, q, k, step)

    def reads(self, stream, step, frame, index, row, current):
        """Chosen frames and the chunk itself."""
        return current or row.frame in self.kept[id(stream)][frame]


class RollingScript(FocusedScript):
    """Focused reading with several chunks in flight: quotas while denoising, the rule at commit."""

    def __init__(self, rule, denoise_start=0, commit_start=0):
        super().__init__(rule)
        self.first, self.quotas = {"denoise": denoise_start, "commit": commit_start}, set()

    def look(self, stream, step, q, k):
        """Choose for every query frame, past and frames in flight."""
        past, flight = past_of(stream.rows), list(step.frames)
        found, may = {f: [*past, *flight] for f in flight}, self.rule.budget + sessions.CHUNK
        if step.chunk >= self.first[step.phase]:
            if step.phase == "commit":
                rule = replace(self.rule, standardise="all")
                chosen = focused_frames(rule, stream.rows, q, k, step)
                found = {f: chosen[f] + flight for f in flight}
            elif len(past) + len(flight) > may:
                found = self.denoise(past, step, q, k)
        self.kept[id(stream)] = found

    def denoise(self, past, step, q, k):
        """The best early frame, itself, and a fair share of past and of frames in flight."""
        asked, flight, found = tokens_of(step, q), tokens_of(step, k), {}
        for frame in step.frames:
            scores = attention_scores(self.rule, past | flight, {frame: asked[frame]}, {}, {})
            first = list(past)[: self.rule.anchors]
            anchor = best_of({f: scores[f] for f in first}, 1)
            middle = {f: scores[f] for f in past if f not in first}
            tail = {f: scores[f] for f in flight if f != frame}
            need = max(0, self.rule.budget + sessions.CHUNK - len(anchor) - 1)
            many = need * len(middle) // max(1, len(middle) + len(tail))
            rest = need - many
            if rest > len(tail):
                many, rest = min(len(middle), need - len(tail)), len(tail)
            elif many > len(middle):
                many, rest = len(middle), min(len(tail), need - len(middle))
            self.quotas.add((min(many, len(middle)), rest))
            found[frame] = [*anchor, frame, *best_of(middle, many), *best_of(tail, rest)]
        return found

    def reads(self, stream, step, frame, index, row, current):
        """Chosen frames."""
        return row.frame in self.kept[id(stream)][frame]
