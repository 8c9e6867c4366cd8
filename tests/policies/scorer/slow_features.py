"""What a scorer sees, said again in plain loops: one head, one query, one row at a time.

Masses are kept as a list, one number for each clean pass since a frame was made. No code is that
of the package but the rotary embedding of its slow twin.
"""

import math
from collections import defaultdict

from lightning_kv.testing.twin import turn

FLOOR = 1e-4


def dot(x, y):
    return float(x @ y)


def length(x):
    return math.sqrt(dot(x, x))


def cosine(x, y):
    return dot(x, y) / (length(x) * length(y))


def mean(vectors):
    return sum(vectors) / len(vectors)


class Held:
    """A frame in the memory of one head."""

    def __init__(self, keys, values, before):
        self.rows, self.masses = keys, []
        self.key, self.value = mean(keys), mean(values)
        lengths = [length(key) for key in keys]
        middle = sum(lengths) / len(lengths)
        spread = math.sqrt(sum((x - middle) ** 2 for x in lengths) / len(lengths))
        self.norms = middle, spread, sum(map(length, values)) / len(values)
        self.motion = 0.0 if before is None else 1 - cosine(self.key, before)

    @property
    def running(self):
        found = 0.0
        for mass in self.masses:
            found = 0.8 * found + 0.2 * mass
        return found


class Head:
    """The memory of one head, and what its queries were like."""

    def __init__(self, geometry, read):
        self.of, self.read = geometry, read
        self.held, self.newest, self.past, self.query = {}, None, [], None

    def look(self, step, q, k, v, queries):
        """A clean pass; the frames that become final are held from now on."""
        tokens, of = self.of.tokens, self.of
        place = {frame: number for number, frame in enumerate(step.frames)}
        own = {f: slice(place[f] * tokens, (place[f] + 1) * tokens) for f in step.frames}
        sampled = min(tokens, math.ceil(queries / len(step.final)))
        picked = [round(i * (tokens - 1) / max(1, sampled - 1)) for i in range(sampled)]
        mass, logit, top = (defaultdict(float) for _ in range(3))
        count = len(step.final) * sampled
        for frame in step.final:
            for token in picked:
                query = turn(of, q[own[frame]][token], frame, token)
                logits = {}
                for other, held in self.held.items():
                    when = self.read(other, frame, step.start)
                    for row, key in enumerate(held.rows):
                        logits[other, row] = dot(query, turn(of, key, when, row))
                for other in step.frames:
                    for row, key in enumerate(k[own[other]]):
                        logits[other, row] = dot(query, turn(of, key, other, row))
                logits = {x: y / math.sqrt(of.head_dim) for x, y in logits.items()}
                whole = sum(math.exp(x) for x in logits.values())
                for other in {x for x, _ in logits}:
                    rows = [x for (f, _), x in logits.items() if f == other]
                    mass[other] += sum(map(math.exp, rows)) / whole / count
                    logit[other] += sum(rows) / len(rows) / count
                    top[other] += max(rows) / count
        for frame in step.final:
            self.held[frame] = Held(k[own[frame]], v[own[frame]], self.newest)
            self.newest = self.held[frame].key
        for frame, held in self.held.items():
            held.masses.append(mass[frame])
            held.logit, held.top = logit[frame], top[frame]
        asked = [x for f in step.final for x in q[own[f]]]
        self.past += asked
        self.query = mean(asked)

    def future(self, frame, start, ahead):
        """Logit of the mean query so far, some frames after the start of the next chunk."""
        past = mean(self.past)
        key, found = self.held[frame].key, 0.0
        side = 2 * (self.of.head_dim // 6)
        timed = (self.of.head_dim - 2 * side) // 2  # pairs that turn with time
        for pair in range(self.of.head_dim // 2):
            q = complex(*past[2 * pair : 2 * pair + 2].tolist())
            k = complex(*key[2 * pair : 2 * pair + 2].tolist())
            omega = self.of.rotary.theta[0] ** (-pair / timed) if pair < timed else 0.0
            angle = omega * (start + ahead - frame)
            found += (q * complex(math.cos(angle), math.sin(angle)) * k.conjugate()).real
        return found / math.sqrt(self.of.head_dim)


def standard(values, among):
    """Standard scores among some frames, at most 4."""
    own = [values[frame] for frame in among]
    middle = sum(own) / len(own)
    spread = math.sqrt(sum((x - middle) ** 2 for x in own) / len(own))
    flat = spread <= 1e-6 * max(abs(x) for x in own)
    return {f: 0.0 if flat else max(-4.0, min(4.0, (values[f] - middle) / spread)) for f in among}


def shared(heads, frame, what):
    """Mean over the heads of all layers that held a frame in the last pass."""
    own = [what(head.held[frame]) for head in heads if frame in head.held]
    return sum(own) / len(own)


def listed(head, layer, heads, step, budget, chunk, passes):
    """Features of the candidates of one head, by frame and name; and its context by name."""
    start, held = step.final[-1] + 1, head.held
    every = sorted(held)
    among = [frame for frame in every if frame < step.final[0]]
    in_layer = {f for other in layer for f in other.held if f < step.final[0]}
    look = {f: shared(heads, f, lambda x: x.running) for f in in_layer}
    middle = sum(x * (start - f) for f, x in look.items()) / max(FLOOR, sum(look.values()))
    log = lambda x: math.log(x + FLOOR)  # noqa: E731
    raw = defaultdict(dict)
    for frame in among:
        own, later = held[frame], [f for f in every if f > frame]
        masses = own.masses
        peak = max(masses)
        put = lambda name, value, frame=frame: raw[name].__setitem__(frame, value)  # noqa: E731
        put("content-dot", dot(head.query, own.key) / math.sqrt(head.of.head_dim))
        put("logit", own.logit)
        put("max-logit", own.top)
        for name, turns in (("future-near", (1, 2)), ("future-far", (3, 4))):
            put(name, sum(head.future(frame, start, n * chunk) for n in turns) / 2)
        put("novelty", 1 - cosine(own.key, mean([held[f].key for f in among])))
        put("newer-key", max(cosine(own.key, held[f].key) for f in later))
        put("newer-value", max(cosine(own.value, held[f].value) for f in later))
        put("neighbour", cosine(own.key, held[later[0]].key))
        for name, value in zip(("key-norm", "key-spread", "value-norm"), own.norms, strict=True):
            put(name, value)
        put("motion", own.motion)
        put("age", math.log(1 + start - frame))
        put("lag", (start - frame) / 24)
        put("last-mass", log(masses[-1]))
        for back in (1, 2, 3):
            put(f"mass-{back}", log(masses[max(0, len(masses) - 1 - back)]))
        put("running-mass", log(own.running))
        put("total-mass", log(sum(masses)))
        put("peak-mass", log(peak))
        put("since-peak", math.log(1 + masses[::-1].index(peak)))
        put("birth-mass", log(masses[0]))
        put("trend", log(masses[-1]) - log(own.running))
        smaller = sum(held[f].running < own.running for f in among)
        put("rank", smaller / max(1, len(among) - 1))
        put("others-mass", log(shared(heads, frame, lambda x: x.masses[-1])))
        put("others-running", log(shared(heads, frame, lambda x: x.running)))
        put("behind", (start - frame - middle) / 6)
    content = ("content-dot", "logit", "max-logit", "future-near", "future-far", "novelty")
    content += ("newer-key", "newer-value", "neighbour")
    for name in (*content, "key-norm", "key-spread", "value-norm", "motion"):
        raw[name] = standard(raw[name], among)
    total = sum(held[f].masses[-1] for f in among)
    shares = [held[f].masses[-1] / max(FLOOR, total) for f in among]
    entropy = -sum(x * math.log(max(FLOOR, x)) for x in shares)
    context = {
        "budget": math.log(budget),
        "candidates": math.log(1 + len(among)),
        "entropy": entropy / math.log(max(2, len(among))),
        "far": log(total),
        "looked-at": middle / 24,
        "switch": min(passes, 4) / 4,
    }
    return {f: {name: own[f] for name, own in raw.items()} for f in among}, context


def every_list(tape, kept, budgets, queries, read=lambda frame, query, start: frame):
    """Features and context of every head at every commit with candidates.

    Args:
        tape: What is played; of its first sample.
        kept: Frames that a head keeps, by chunk, layer and head.
        budgets: History frames of each layer's heads.
        queries: That look.
        read: At which time a query frame meets a held frame, given where the pass starts.

    Returns:
        By chunk, layer and head.
    """
    of, found, passes = tape.geometry, {}, 0
    grid = [[Head(of, read) for _ in range(of.heads)] for _ in range(of.layers)]
    heads = [head for layer in grid for head in layer]
    for entry in tape.entries:
        step = entry.step
        passes = 0 if any(e.kind == "prompt_switch" for e in entry.events) else passes
        for event in entry.events:
            for head in heads if event.kind == "prompt_switch" else ():
                head.past = []
        if not step.final:
            continue
        for layer, (q, k, v) in zip(grid, entry.layers, strict=True):
            for number, head in enumerate(layer):
                head.look(step, q[0, :, number], k[0, :, number], v[0, :, number], queries)
        passes += 1
        for at, layer in enumerate(grid):
            for number, head in enumerate(layer):
                if len(head.held) > len(step.final):
                    found[step.chunk, at, number] = listed(
                        head, layer, heads, step, budgets[at][number], of.chunk, passes
                    )
        for at, layer in enumerate(grid):
            for number, head in enumerate(layer):
                stay = kept[step.chunk, at, number]
                head.held = {frame: own for frame, own in head.held.items() if frame in stay}
    return found
