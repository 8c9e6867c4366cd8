"""Echo-Forcing's window against plain Python: what rolls, what is picked, and where it stands."""

import cmath
import math

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import load_policy
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    without_commits,
)


def pairs(vector):
    """Complex numbers of a real vector."""
    return [complex(a, b) for a, b in vector.double().view(-1, 2).tolist()]


class EchoScript(Script):
    """Frames in lists, slots counted one by one, cosines summed pair by pair."""

    def __init__(self, budget, cycle=0.8, offsets=(), drift=3.0, reuse=8, place="own"):
        self.budget, self.cycle, self.offsets = budget, cycle, offsets
        self.drift, self.reuse, self.place = drift, reuse, place
        self.past, self.seen, self.wins, self.gates, self.tired = {}, {}, {}, [], 0

    @staticmethod
    def key(stream):
        return stream.namespace, stream.sample, stream.layer, stream.head

    def rolling(self, chunk):
        rest = self.budget - chunk
        cycle = self.cycle if isinstance(self.cycle, int) else math.floor(self.cycle * rest + 0.5)
        return min(cycle, rest - 1)

    def look(self, stream, step, q, k):
        """Sums over clean queries up to the end of the first full window."""
        clean = not step.rebuild and step.final and step.clean
        if clean and step.final[-1] < self.budget + stream.geometry.chunk:
            self.seen.setdefault(self.key(stream), []).extend(pairs(x) for x in q)

    def commit_all(self, streams, step):
        chunk, end = streams[0].geometry.chunk, step.final[-1] + 1
        for stream in streams:
            every = self.past.setdefault(self.key(stream), [])
            every += [row.clone() for row in stream.rows if row.frame in step.final]
            if end <= self.budget:
                continue
            stream.rows = [row for row in every if row.frame >= end - chunk]
            stream.archive = [row for row in every if self.comes_back(row.frame, end, chunk)]

    def comes_back(self, frame, end, chunk):
        early, late = frame < self.rolling(chunk), frame >= end - chunk - self.budget
        return frame < end - chunk and (early or late)

    def open_all(self, streams, step):
        start, chunk, tokens = step.start, streams[0].geometry.chunk, streams[0].geometry.tokens
        if start <= self.budget:
            return
        cycle = self.rolling(chunk)
        order = [*range(cycle), *reversed(range(cycle))] * 20
        low, high = start - chunk - self.budget, start - chunk
        names = [
            (r.frame, r.place) for r in self.past[self.key(streams[0])] if low <= r.frame < high
        ]
        picked = self.pick(streams, step, names, (self.budget - chunk - cycle) * tokens)
        for stream in streams:
            by_name = {(r.frame, r.place): r for r in self.past[self.key(stream)]}
            for slot in range(cycle):
                for place in range(tokens):
                    row = by_name[order[start - self.budget + slot], place]
                    stream.rows.append(row.clone(time=float(start - self.budget + slot)))
            for i, name in enumerate(picked):
                time = float(start - self.budget + cycle + i // tokens)
                place = i % tokens if self.place == "slot" else name[1]
                stream.rows.append(by_name[name].clone(time=time, place=place))

    def pick(self, streams, step, names, count):
        total = dict.fromkeys(names, 0.0)
        gate = self.gate(streams)
        offsets = self.offsets
        if not offsets:
            span = self.budget + streams[0].geometry.chunk
            offsets = [2**i for i in range(20) if 2**i <= span]
        for stream in streams:
            rows = {(r.frame, r.place): r for r in self.past[self.key(stream)]}
            mean, length = self.means(stream)
            width = stream.geometry.head_dim - 4 * (stream.geometry.head_dim // 6)
            for name in names:
                k = pairs(rows[name].k)
                for f, (q, size) in enumerate(zip(mean, length, strict=True)):
                    turns = 2 * f < width
                    w = 10000.0 ** (-2 * f / width) if turns else 0.0
                    angle = cmath.phase(q * k[f].conjugate())
                    for o in offsets:
                        cos = math.cos(w * (step.start - name[0] + o) + angle)
                        total[name] += abs(q) * abs(k[f]) * cos / len(offsets)
                    total[name] += gate * (size - abs(q)) * abs(k[f])
        wins = self.wins.setdefault(self.key(streams[0]), {})
        spent = {n for n in names if self.reuse and wins.get(n, 0) >= self.reuse}
        self.tired += len(spent)
        best = sorted(names, key=lambda n: (n in spent, -total[n], n))[:count]
        for name in best:
            wins[name] = wins.get(name, 0) + 1
        return sorted(best)

    def means(self, stream):
        seen = self.seen[self.key(stream)]
        mean = [sum(x) / len(seen) for x in zip(*seen, strict=True)]
        return mean, [sum(map(abs, x)) / len(seen) for x in zip(*seen, strict=True)]

    def gate(self, streams):
        dot = now_ = then_ = 0.0
        for stream in streams:
            now = [pairs(query.raw) for query in stream.queries]
            now = [sum(x) / len(now) for x in zip(*now, strict=True)]
            for a, b in zip(now, self.means(stream)[0], strict=True):
                dot += (a * b.conjugate()).real
                now_, then_ = now_ + abs(a) ** 2, then_ + abs(b) ** 2
        self.gates.append(math.exp(-self.drift * (1 - dot / math.sqrt(now_ * then_))))
        return self.gates[-1]


def policy(budget, **settings):
    return load_policy(
        {"name": "x", "retain": {"part": "echo-forcing", "budget": f"{budget}f", **settings}}
    )


WORLD = {"heads": 2, "batch": 2, "grid": (1, 2)}
SWITCH = (Event("prompt_switch", 12, "another"), Event("scene_cut", 20))
CASES = {
    "threes": (6, {}, chunked([3] * 14, noisy=1), WORLD | {"layers": 1}),
    "threes, at nine": (9, {}, chunked([3] * 14, noisy=1), WORLD),
    "single frames, tiring": (
        5, {"cycle": 3, "reuse": 2}, chunked([1] * 14, noisy=1), WORLD | {"grid": (3, 2)},
    ),
    "fours, short last, offsets": (
        9, {"offsets": [1, 5]}, chunked([4] * 13 + [1], noisy=1), WORLD | {"batch": 1},
    ),
    "other first chunk, events": (
        6, {"cycle": 0.5, "drift": 0.5}, chunked([1] + [3] * 13, noisy=1),
        WORLD | {"events": SWITCH},
    ),
    "guided, given chunks, slots": (
        6, {"place": "slot", "cycle": 1}, guided(chunked([2] * 14, noisy=1, context=2)),
        WORLD | {"batch": 1},
    ),
    "several chunks in flight": (6, {"reuse": 0}, rolling(2, 28, 2), WORLD | {"batch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(7)
def test_every_decision_is_the_twins(case):
    """In float64, so that no rounding decides between two rows."""
    budget, settings, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, **world)
    script = EchoScript(budget, **settings)
    found = compare_decisions(policy(budget, **settings), script, tape, ("kept", "read"))
    assert found.equal == found.total >= 200
    assert script.gates and (script.tired or "tiring" not in case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_rows_are_the_twins(case):
    """The archive too, and times and places of all that is read."""
    budget, settings, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, **world | {"batch": 1, "layers": 1})
    assert_same_as_twin(policy(budget, **settings), EchoScript(budget, **settings), tape)


def test_the_worked_example_of_a_window_of_21():
    """Which first frames stand in the twelve slots, and where all others come from."""
    seen, tokens = {}, 2
    tape = random_tape(chunked([3] * 15, noisy=1), layers=1, heads=2, grid=(1, tokens))

    def watch(view):
        if view.step.opens:
            pairs = sorted(zip(view.time[0].tolist(), view.frame_id[0].tolist(), strict=True))
            seen[view.step.start] = pairs
            seen[view.step.start, "aside"] = view.archive.frames

    tape.play(tape.session(preset("echo-forcing"), watch=watch))
    for start in range(0, 21, 3):
        assert [f for _, f in seen[start][::tokens]] == list(range(start))
    slots = {
        21: [*range(3, 12), 11, 10, 9],
        24: [*range(6, 12), 11, 10, 9, 8, 7, 6],
        27: [9, 10, 11, *range(11, 2, -1)],
        30: [*range(11, -1, -1)],
        33: [*range(8, -1, -1), 0, 1, 2],
        42: [*range(12)],
    }
    for start, wanted in slots.items():
        first = start - 18
        frames = [f for time, f in seen[start] if time < first + 12]
        assert frames == [f for f in wanted for _ in range(tokens)]
        middle = [(time, f) for time, f in seen[start] if first + 12 <= time < first + 15]
        assert [time for time, _ in middle] == [
            float(first + 12 + i // tokens) for i in range(3 * tokens)
        ]
        assert {f for _, f in middle} <= set(range(start - 21, start - 3))
        recent = [(time, f) for time, f in seen[start] if time >= first + 15]
        assert recent == [(float(f), f) for f in range(start - 3, start) for _ in range(tokens)]
        assert seen[start, "aside"] == tuple(sorted({*range(12), *range(start - 21, start - 3)}))


def test_a_sampler_without_clean_passes_is_refused():
    tape = random_tape(without_commits(chunked([3] * 5)))
    with pytest.raises(ValueError, match="commits frames in a pass at t = 0"):
        tape.play(policy(6))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cycle": 1.5}, "neither frames nor a share"),
        ({"drift": -1.0}, "drift"),
        ({"reuse": -1}, "reuse"),
        ({"place": "grid"}, "own, slot"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(9, **settings)
