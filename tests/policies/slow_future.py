"""Future Forcing's memory in plain Python, stream by stream, row by row, for the slow twin."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from slow import Watching, sessions, softmax, turn

from lightning_kv.testing import Row


def named(rows):
    """The last row at each frame and place, by its index."""
    return {(r.frame, r.place): i for i, r in enumerate(rows)}


@dataclass
class FutureRule:
    """The settings of a future retention; ``rows`` is the budget in tokens."""

    rows: int
    granularity: str = "frame"
    sink: int = 0
    proxy: str = "bank"
    horizon: int = 6
    steps: int = 2
    reduce: str = "mean"
    variance: bool = False
    value_norm: bool = False
    cells: tuple = (2, 1)
    rate: float = 0.3
    bank_frames: int = 4
    bank_rows: int = 2
    redundancy: str | None = None
    similar: float = 9.0
    neighbourhood: int = 0
    merge: str = "drop"
    align: str = "raw"
    most: int = 8
    limit: float | None = 0.1
    log_weight: bool = False
    shares: tuple | None = None

    def settings(self):
        """The same for the part."""
        own = ("rows", "log_weight", "shares")
        out = {k: v for k, v in self.__dict__.items() if k not in own}
        budget = f"{self.rows}t"
        if self.shares:
            budget = {"part": "table", "amount": budget, "shares": self.shares}
        return {"part": "future", "budget": budget, **out}

    def room(self, stream):
        """Rows that a head may keep: of single rows any number, unless heads differ."""
        tokens = sessions.GEOMETRY.tokens
        if self.shares:
            share = self.shares[stream.layer][stream.head]
            return round(share * self.rows / tokens) * tokens
        return self.rows if self.granularity == "token" else self.rows // tokens * tokens

    @property
    def bias(self):
        """The policy's bias."""
        return "log_weight" if self.log_weight else None


@dataclass
class Asked:
    """Turned queries to come, and the variance of a complex pair around them."""

    queries: list
    variance: torch.Tensor | None = None

    @property
    def mean(self):
        """The mean query."""
        return sum(self.queries) / len(self.queries)


class FutureScript(Watching):
    """Future retention for the twin."""

    def __init__(self, rule):
        self.rule, self.known, self.passes = rule, {}, {}
        self.masses = []  # of merged rows: wanted, found, and whether the step was cut

    def forget(self):
        """A prompt switch."""
        self.known, self.passes = {}, {}

    def look(self, stream, step, q, k):
        """Remember the queries of clean passes."""
        if step.phase == "denoise" or not step.final:
            return
        tokens, rule = sessions.GEOMETRY.tokens, self.rule
        rows = [
            (step.frames[i // tokens], i % tokens, x.double())
            for i, x in enumerate(q)
            if step.frames[i // tokens] in step.final
        ]
        if rule.proxy == "bank":
            count = min(rule.bank_rows, tokens)
            chosen = {
                f: {(i * tokens // count + f) % tokens for i in range(count)} for f in step.final
            }
            old = self.known.get(id(stream), [])
            new = old + [x for x in rows if x[1] in chosen[x[0]]]
            self.known[id(stream)] = new[-rule.bank_frames * count :]
            return
        seen = self.passes[id(stream)] = self.passes.get(id(stream), 0) + 1
        weight = max(1 / seen, rule.rate)
        old = [((1 - weight) * w, p, x) for w, p, x in self.known.get(id(stream), [])]
        self.known[id(stream)] = old + [(weight / len(rows), p, x) for _, p, x in rows]

    def asked(self, stream, coming):
        """What the chunks to come may ask."""
        rule, known = self.rule, self.known[id(stream)]
        start = coming.query_times[0]
        times = [start + s * rule.horizon / rule.steps for s in range(rule.steps)]
        if rule.proxy == "bank":
            return Asked([turn(x, t, p) for t in times for _, p, x in known])
        cell = {p: self.cell(p) for p in range(sessions.GEOMETRY.tokens)}
        queries, spread, means = [], 0.0, {}
        for c in set(cell.values()):
            own = [(w, x) for w, p, x in known if cell[p] == c]
            means[c] = sum(w * x for w, x in own) / sum(w for w, _ in own)
        for w, p, x in known:
            spread = spread + w * (x - means[cell[p]]).square()
        for t in times:
            for c, mean in means.items():
                places = [divmod(p, sessions.GEOMETRY.grid[1]) for p in cell if cell[p] == c]
                row, column = (statistics.fmean(x) for x in zip(*places, strict=True))
                queries.append(turn(mean, t, (row, column)))
        return Asked(queries, spread.view(-1, 2).sum(1))

    def cell(self, place):
        """The spatial cell of a place."""
        at = divmod(place, sessions.GEOMETRY.grid[1])
        cells = (1, 1) if self.rule.proxy == "mean" else self.rule.cells
        counts = [min(n, size) for n, size in zip(cells, sessions.GEOMETRY.grid, strict=True)]
        return tuple(
            x * n // size for x, n, size in zip(at, counts, sessions.GEOMETRY.grid, strict=True)
        )

    def bias(self, stream, step, frame, index, row):
        """Merged rows count for their tokens if the policy says so."""
        return math.log(row.weight) if self.rule.log_weight else 0.0

    def unit(self, row):
        """What is kept or given up as one: a frame, or a row."""
        return row.frame if self.rule.granularity == "frame" else (row.frame, row.place)

    # -- the decision --------------------------------------------------------------------------

    def commit(self, stream, step):
        """Give up what is alike and then what is asked for least."""
        rule, rows, room = self.rule, stream.rows, self.rule.room(stream)
        if len(rows) <= room:
            return
        start = step.final[-1] + 1
        coming = type(step)(
            "denoise", tuple(range(start, start + len(step.final))), (), step.chunk + 1
        )
        asked = self.asked(stream, coming)
        seen = [self.time(stream, coming, r) for r in rows]
        keys = [turn(r.k, t, r.place) for r, t in zip(rows, seen, strict=True)]
        logits = self.logits(rows, keys, asked)
        unit = [self.unit(r) for r in rows]
        units = sorted(set(unit))
        safe = {
            u
            for u, r in zip(unit, rows, strict=True)
            if r.frame < rule.sink or r.frame >= step.final[0]
        }
        if rule.granularity == "frame":
            room //= sessions.GEOMETRY.tokens
        before = self.scores(rows, logits, unit, set(units))
        gone, match = [], {}
        if rule.redundancy:
            gap = self.gaps(rows, keys, asked)
            near = self.nearest(rows, unit, units, gap)
            spare = [u for u in units if u not in safe and near[u][0] < rule.similar]
            spare.sort(key=lambda u: (near[u][0], u))
            gone = spare[: max(0, len(units) - room)]
            match = {u: near[u][1] for u in gone}
        alive = [u for u in units if u not in gone]
        score = self.scores(rows, logits, unit, set(alive))
        rest = sorted((u for u in alive if u not in safe), key=lambda u: (-score[u], u))
        kept = safe | set(rest[: max(0, room - len(safe))])
        self.match, self.gone, self.kept = match, gone, kept
        if rule.merge == "drop" or not gone:
            stream.rows = [r for r, u in zip(rows, unit, strict=True) if u in kept]
            return
        into = self.sources(gone, match, kept, before)
        stream.rows = self.merged(rows, keys, seen, unit, kept, into, asked.mean)

    def logits(self, rows, keys, asked):
        """``[query][row]``, with the variance and the weight where they count."""
        width, found = len(keys[0]), []
        for q in asked.queries:
            own = []
            for r, key in zip(rows, keys, strict=True):
                x = float(q @ key) / math.sqrt(width)
                if self.rule.variance:
                    power = key.view(-1, 2).square().sum(1)
                    x += float(asked.variance @ power) / (4 * width)
                own.append(x + self.bias(None, None, None, None, r))
            found.append(own)
        return found

    def scores(self, rows, logits, unit, alive):
        """Mean or largest share of every living unit over the queries to come."""
        there = [i for i, u in enumerate(unit) if u in alive]
        each = {u: [] for u in alive}
        for own in logits:
            shares = softmax([own[i] for i in there])
            if self.rule.value_norm:
                shares = [
                    s * math.sqrt(float(rows[i].v.double() @ rows[i].v.double()))
                    for s, i in zip(shares, there, strict=True)
                ]
            total = dict.fromkeys(alive, 0.0)
            for i, s in zip(there, shares, strict=True):
                total[unit[i]] += s
            for u, s in total.items():
                each[u].append(s)
        pick = max if self.rule.reduce == "max" else statistics.fmean
        return {u: pick(x) for u, x in each.items()}

    def gaps(self, rows, keys, asked):
        """Squared distance of two rows by their index; mean squared length is 1.

        Of rows that share a frame and place the last is compared, and counts in the mean.
        """
        raw, values = [r.k.double() for r in rows], [r.v.double() for r in rows]
        known = named(rows).values()

        def spread(x, y=None):
            """Expected squared logit of a key, or of the difference of two."""
            d = x if y is None else x - y
            total = statistics.fmean(float(q @ d) ** 2 for q in asked.queries)
            if asked.variance is not None:
                total += float(asked.variance @ d.view(-1, 2).square().sum(1)) / 2
            return total

        def length(x, y=None):
            d = x if y is None else x - y
            return float(d @ d)

        if self.rule.redundancy == "cosine":
            unit = [x / math.sqrt(length(x)) for x in raw]
            return lambda i, j: length(unit[i], unit[j])
        if self.rule.redundancy == "future":
            power = statistics.fmean(spread(keys[i]) for i in known)
            return lambda i, j: spread(keys[i], keys[j]) / power
        scale = [statistics.fmean(length(x[i]) for i in known) for x in (raw, values)]
        return lambda i, j: (
            (length(raw[i], raw[j]) / scale[0] + length(values[i], values[j]) / scale[1]) / 2
        )

    def nearest(self, rows, unit, units, gap):
        """Distance to the most alike younger unit, and which it is, of every unit."""
        where, found = named(rows), {}
        known = {unit[i] for i in where.values()}
        for u in units:
            best = (math.inf, None)
            for other in units:
                both = {u, other} <= known
                d = self.distance(u, other, where, gap) if both else None
                if d is not None and d < best[0]:
                    best = (d, other)
            found[u] = best
        return found

    def distance(self, u, other, where, gap):
        """Of a unit to a younger one; None where they are not compared."""
        if self.rule.granularity == "token":
            near = all(
                abs(a - b) <= self.rule.neighbourhood
                for a, b in zip(
                    divmod(u[1], sessions.GEOMETRY.grid[1]),
                    divmod(other[1], sessions.GEOMETRY.grid[1]),
                    strict=True,
                )
            )
            return gap(where[u[:2]], where[other[:2]]) if near and other[0] > u[0] else None
        both = [p for p in range(sessions.GEOMETRY.tokens) if {(u, p), (other, p)} <= where.keys()]
        if other <= u or not both:
            return None
        return statistics.fmean(gap(where[u, p], where[other, p]) for p in both)

    # -- merges --------------------------------------------------------------------------------

    def sources(self, gone, match, kept, score):
        """Units that go into each kept unit: along the chain, the largest scores first."""
        into = {}
        for u in gone:
            target = match[u]
            while target in match:
                target = match[target]
            if target in kept:
                into.setdefault(target, []).append(u)
        return {
            t: sorted(own, key=lambda u: -score[u])[: self.rule.most] for t, own in into.items()
        }

    def merged(self, rows, keys, seen, unit, kept, into, mean):
        """Kept rows that stay as they are, then the merged ones in the order of their targets."""
        where, parts = named(rows), {}
        for target, sources in into.items():
            for u in sources:
                if self.rule.granularity == "token":
                    parts.setdefault(where[target[:2]], []).append(where[u[:2]])
                    continue
                for p in range(sessions.GEOMETRY.tokens):
                    if {(target, p), (u, p)} <= where.keys():
                        parts.setdefault(where[target, p], []).append(where[u, p])
        left = [
            r
            for i, (r, u) in enumerate(zip(rows, unit, strict=True))
            if u in kept and i not in parts
        ]
        return left + [self.one(rows, keys, seen, i, [i, *parts[i]], mean) for i in sorted(parts)]

    def one(self, rows, keys, seen, at, members, mean):
        """One row for several."""
        rule, width, target = self.rule, math.sqrt(len(mean)), rows[at]
        logit = [float(mean @ keys[i]) / width for i in members]
        own = list(logit)
        if rule.merge == "weight":
            own = [x + math.log(rows[i].weight) for x, i in zip(own, members, strict=True)]
        share = softmax(own)
        if rule.align == "raw":
            k = sum(s * rows[i].k.double() for s, i in zip(share, members, strict=True))
        else:
            turned = [turn(rows[i].k, rows[i].time, rows[i].place) for i in members]
            k = sum(s * x for s, x in zip(share, turned, strict=True))
            k = turn(k, target.time, target.place, sign=-1)
        if rule.merge == "hyperplane":
            wanted = width * math.log(sum(math.exp(x) for x in logit))
            step = (wanted - float(turn(k, seen[at], target.place) @ mean)) * mean / (mean @ mean)
            share_of_it = 1.0
            if rule.limit is not None:
                share_of_it = min(1.0, rule.limit * float(k.norm()) / float(step.norm()))
            k = k + turn(share_of_it * step, seen[at], target.place, sign=-1)
            reached = float(turn(k, seen[at], target.place) @ mean) / width
            self.masses.append((wanted / width, reached, share_of_it < 1))
        v = sum(s * rows[i].v.double() for s, i in zip(share, members, strict=True))
        weight = sum(rows[i].weight for i in members)
        return Row(target.frame, target.time, target.place, k, v, weight)
