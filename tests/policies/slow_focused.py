"""What Focused Forcing reads in its authors' own programs, said again with lists and loops.

One class for each of their backbones. It walks over a tape with a cache of its own and answers, for
every pass, layer, head and query frame, which frames are read; attention itself is left out, since
what goes in does not depend on what comes out. Frames are ``(id, keys before rotation [T, D])``.
"""

from __future__ import annotations

import math

import torch

from lightning_kv.testing.twin import turn

WINDOW, CHUNK, FRONT = 21, 3, 3


def budgets(table, least, most):
    """Frames of every head as the authors count them: the current chunk included."""
    values = [value for row in table for value in row]
    low, high = min(values), max(values)
    return [
        [round(least + ((value - low) / (high - low)) ** 2 * (most - least)) for value in row]
        for row in table
    ]


def pooled(frame, groups):
    """Half mean, half maximum of each run of tokens."""
    size = len(frame) // groups
    runs = [frame[i * size : (i + 1) * size] for i in range(groups)]
    return [0.5 * (run.mean(0) + run.max(0).values) for run in runs]


def standard(values, inside=0.0, outside=0.0):
    """Minus the mean, over the deviation of all of them."""
    mean = sum(values) / len(values)
    var = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / (math.sqrt(var + inside) + outside) for value in values]


def looked_at(query, keys, groups):
    """How much one query frame looks at each key frame."""
    asked, found = torch.stack(pooled(query, groups)), []
    for key in keys:
        pairs = asked @ torch.stack(pooled(key, groups)).T
        found.append(float(pairs.mean()) / math.sqrt(query.shape[1]))
    return standard(found, inside=1e-6)


def unlike(keys):
    """How unlike the mean of all of them each key frame is."""
    found, mean = [], sum(keys) / len(keys)
    for key in keys:
        cosines = []
        for a, b in zip(mean, key, strict=True):
            lengths = (float(a @ a) + 1e-6) * (float(b @ b) + 1e-6)
            cosines.append(float(a @ b) / math.sqrt(lengths))
        found.append(-sum(cosines) / len(cosines))
    return standard(found, outside=1e-6)


def best(scores, count):
    """Indices of the best of ``{index: score}``, the smaller of equals."""
    return sorted(scores, key=lambda i: (-scores[i], i))[: max(0, count)]


def with_current(scores, count, budget):
    """The best of the first, the current chunk behind ``count`` frames, the best of the others."""
    first = best({i: scores[i] for i in range(FRONT)}, 1)
    rest = best({i: scores[i] for i in range(count) if i not in first}, budget - 1 - CHUNK)
    return {*first, *rest, *range(count, count + CHUNK)}


def in_proportion(scores, query, asked, budget):
    """The best of the first, the query frame itself, and shares of the middle and the others."""
    tail = len(scores) - asked
    chosen = {*best({i: scores[i] for i in range(FRONT)}, 1), tail + query}
    middle = {i: scores[i] for i in range(FRONT, tail)}
    others = {i: scores[i] for i in range(tail, len(scores)) if i != tail + query}
    need = max(0, budget - 2)
    from_middle = need * len(middle) // max(1, len(middle) + len(others))
    return {*chosen, *best(middle, from_middle), *best(others, need - from_middle)}


class Release:
    """What all backbones share.

    Args:
        tape: What is played.
        budgets: Of every layer and head, the current chunk included.
        weight: Of attention.
    """

    def __init__(self, tape, budgets, weight):
        self.tape, self.budgets, self.weight = tape, budgets, weight
        self.groups, self.known = tape.geometry.grid[0], {}

    def turned(self, frame, time, name="k"):
        """Keys or queries of a frame at a time."""
        _, keys = frame
        where = (name, id(keys), time)
        if where not in self.known:
            rows = [turn(self.tape.geometry, x, time, place) for place, x in enumerate(keys)]
            self.known[where] = torch.stack(rows), keys  # which keeps its address from others
        return self.known[where][0]

    def picks(self):
        """Frames read, ``{(layer, head, chunk, phase, step, query frame): set of ids}``."""
        found = {}
        for layer in range(self.tape.geometry.layers):
            for head in range(self.tape.geometry.heads):
                self.cache = []
                for entry in self.tape.entries:
                    own = self.split(entry, layer, head)
                    read = self.one(entry.step, *own, self.budgets[layer][head])
                    for frame, ids in zip(entry.step.frames, read, strict=True):
                        step = entry.step
                        when = (step.chunk, step.phase, step.step, step.start, frame)
                        found[(layer, head, *when)] = ids
                    if entry.step.final:
                        self.commit(own[1][: len(entry.step.final)])
        return found

    def split(self, entry, layer, head):
        """Queries and keys of each frame of a pass."""
        tokens = self.tape.geometry.tokens
        q, k = (x[0, :, head].split(tokens) for x in entry.layers[layer][:2])
        frames = entry.step.frames
        return list(zip(frames, q, strict=True)), list(zip(frames, k, strict=True))

    def mixed(self, query, keys, weight, unlike_ones):
        """Scores of key frames for one query frame."""
        looked = looked_at(query, keys, self.groups)
        return [weight * a + (1 - weight) * b for a, b in zip(looked, unlike_ones, strict=True)]


class SelfForcing(Release):
    """A sink of 15 that follows the chunk, diversity once per chunk, over the history."""

    sink = 15

    def commit(self, frames):
        """Clean frames are written; what is too old goes when the next chunk begins."""
        self.cache += frames
        while len(self.cache) > WINDOW - CHUNK:
            del self.cache[self.sink]

    def one(self, step, queries, keys, budget):
        """All before the seventh chunk; then by scores of the 18 clean frames."""
        every = [frame for frame, _ in self.cache + keys]
        if step.chunk < WINDOW // CHUNK - 1:
            return [set(every)] * len(queries)
        shift = max(0, step.start - WINDOW)
        clean = [self.turned(x, x[0] + (shift if x[0] < self.sink else 0)) for x in self.cache]
        odd, found = unlike(clean), []
        for frame, q in queries:
            query = self.turned((frame, q), frame, "q")
            scores = self.mixed(query, clean, self.weight, odd)
            found.append({every[i] for i in with_current(scores, len(clean), budget)})
        return found


class LongLive(SelfForcing):
    """A sink of 3 at its own times; scores are over all 21 frames, the current ones too."""

    sink = 3

    def one(self, step, queries, keys, budget):
        """All before the seventh chunk; then by scores of all frames."""
        together = self.cache + keys
        every = [frame for frame, _ in together]
        if step.chunk < WINDOW // CHUNK - 1:
            return [set(every)] * len(queries)
        turned = [self.turned(x, x[0]) for x in together]
        odd, found = unlike(turned), []
        for frame, q in queries:
            query = self.turned((frame, q), frame, "q")
            scores = self.mixed(query, turned, self.weight, odd)
            found.append({every[i] for i in with_current(scores, len(self.cache), budget)})
        return found


class RollingForcing(Release):
    """The first chunk as an anchor, what fits between it and the query, and the query."""

    def commit(self, frames):
        """The buffer holds 24 frames with the chunk that is being written; the first 3 stay."""
        self.cache += frames
        while len(self.cache) > 24 - CHUNK:
            del self.cache[FRONT]

    def one(self, step, queries, keys, budget):
        """A commit sees the newest 21 frames; denoising the anchor, some clean ones and itself."""
        if step.phase == "commit":
            together = (self.cache + keys)[-WINDOW:]
            times = [frame for frame, _ in together]
        else:
            room = max(0, WINDOW - len(queries) - CHUNK)
            clean = self.cache[CHUNK:]
            clean = clean[max(0, len(clean) - room) :]
            anchor = self.cache[:CHUNK]
            together = anchor + clean + keys
            first = step.start - len(clean) - CHUNK
            times = [first + i for i in range(len(anchor))] + [f for f, _ in clean + keys]
        every = [frame for frame, _ in together]
        if step.chunk < (6 if step.phase == "commit" else 2):
            return [set(every)] * len(queries)
        turned = [self.turned(x, time) for x, time in zip(together, times, strict=True)]
        odd, found = unlike(turned), []
        for i, (frame, q) in enumerate(queries):
            query = self.turned((frame, q), frame, "q")
            if step.phase == "commit":
                scores = self.mixed(query, turned, self.weight, odd)
                chosen = with_current(scores, len(turned) - CHUNK, budget)
            else:
                scores = looked_at(query, turned, self.groups)
                chosen = in_proportion(scores, i, len(queries), budget)
            found.append({every[j] for j in chosen})
        return found
