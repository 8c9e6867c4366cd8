"""TetherCache against plain Python: what is aside, what competes, and what is drawn to what."""

import math

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import policy_from_dict
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


class TetherScript(Script):
    """The method once more; ``sink``, ``memory`` and ``recent`` in frames."""

    def __init__(self, sink, memory, recent, diversity=0.35, tether=0.35):
        self.sink, self.memory, self.recent = sink, memory, recent
        self.diversity, self.tether = diversity, tether
        self.aside, self.kept, self.events = {}, {}, 0

    @property
    def held(self):
        return self.sink + self.memory + self.recent

    def commit(self, stream, step):
        frames = sorted({row.frame for row in stream.rows})
        full = step.next_chunk and len(frames) + step.next_chunk > self.held
        where = (stream.namespace, stream.sample)
        self.aside[where] = frames[-self.recent :][: step.next_chunk] if full else []
        for row in stream.rows:
            row.columns["aside"] = float(row.frame in self.aside[where])

    def fresh(self, row):
        return row.clone(columns={"aside": 0.0})

    def time(self, stream, step, row):
        """Frames that are read stand side by side; those aside share the place of the next."""
        aside = self.aside.get((stream.namespace, stream.sample), [])
        newer = {r.frame for r in stream.rows if r.frame >= row.frame and r.frame not in aside}
        return step.query_times[0] - len(newer)

    def reads(self, stream, step, frame, index, row, current):
        return current or row.frame not in self.aside.get((stream.namespace, stream.sample), [])

    def closing_all(self, streams, step):
        one = streams[0]
        where = (one.namespace, one.sample, one.layer)
        frames = sorted({row.frame for row in one.rows})
        self.kept[where] = None
        if len(frames) + len(step.final) <= self.held:
            return
        still = frames[len(frames) - (self.recent - len(step.final)) :]
        old = [f for f in frames if f not in still]
        sink, candidates = old[: self.sink], old[self.sink :]
        new = [f for f in candidates if f in frames[-self.recent :]]
        trusted = sink + [f for f in candidates if f not in new]
        best = candidates
        if len(candidates) > self.memory:
            score = self.scores(streams, step, candidates)
            best = sorted(candidates, key=lambda f: (-score[f], f))[: self.memory]
            self.events += 1
        self.kept[where] = sink + sorted(best) + still, [f for f in best if f in new], trusted

    def scores(self, streams, step, candidates):
        mean = dict.fromkeys(candidates, 0.0)
        for stream in streams:
            asked = [query for query in stream.queries if query.frame in step.final]
            for frame in candidates:
                rows = [row for row in stream.rows if row.frame == frame]
                for query in asked:
                    for row in rows:
                        logit = float(query.raw.double() @ row.k.double())
                        logit /= math.sqrt(len(row.k))
                        mean[frame] += logit / len(rows) / len(asked) / len(streams)
        top = max(mean.values())
        total = sum(math.exp(x - top) for x in mean.values())
        mass = {f: math.exp(x - top) / total for f, x in mean.items()}
        reach = max(1, (candidates[-1] - candidates[0] + 1) / 2)
        found = {}
        for i in candidates:
            near = [mass[j] * math.exp(-abs(i - j) / reach) for j in candidates if j != i]
            found[i] = mass[i] + self.diversity * max(0, 1 - max(near, default=0))
        return found

    def closing(self, stream, step, q):
        said = self.kept[stream.namespace, stream.sample, stream.layer]
        self.aside[stream.namespace, stream.sample] = []
        for row in stream.rows:
            row.columns["aside"] = 0.0
        if said is None:
            return
        kept, new, trusted = said
        model = [row for row in stream.rows if row.frame in trusted]
        changed = {}
        for frame in new if model else []:
            own = [row for row in stream.rows if row.frame == frame]
            for name in ("k", "v"):
                mine, theirs = (torch.stack([getattr(r, name) for r in x]) for x in (own, model))
                for channel in range(mine.shape[1]):
                    (m, s), (to, wide) = (spread(x[:, channel].tolist()) for x in (mine, theirs))
                    for row, x in zip(own, mine[:, channel].tolist(), strict=True):
                        moved = wide * (x - m) / s + to
                        x = (1 - self.tether) * x + self.tether * moved
                        changed.setdefault((frame, row.place), {}).setdefault(name, []).append(x)
        rows = [row for row in stream.rows if row.frame in kept]
        stream.rows = [
            row.clone(
                **{
                    name: torch.tensor(x, dtype=row.k.dtype)
                    for name, x in changed.get((row.frame, row.place), {}).items()
                }
            )
            for row in rows
        ]


def spread(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, max(1e-6, math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers)))


def tether(budget, select="quarantine", **settings):
    own = {"part": "tether-cache", "budget": budget, **settings}
    places = {"part": "contiguous", "of": "read"}
    return policy_from_dict({"name": "x", "retain": own, "select": select, "positions": places})


# Steps, geometry, budget and settings, the frames of sink, memory and recent.
CASES = {
    "three frames": (
        chunked([3] * 14, noisy=1),
        {"grid": (1, 2), "batch": 2},
        ("9f", {}),
        (1, 4, 4),
    ),
    "single frames": (
        chunked([1] * 15, noisy=1),
        {"grid": (2, 3), "batch": 2},
        ("9f", {"recent": 2, "sink": 2}),
        (2, 5, 2),
    ),
    "pairs that do not fill it": (
        chunked([2] * 14, noisy=1),
        {"grid": (1, 5), "heads": 2},
        ("11f", {"sink": 1, "diversity": 0.0}),
        (1, 6, 4),
    ),
    "fours, a short last chunk": (
        chunked([4] * 13 + [2], noisy=1),
        {"grid": (1, 2), "batch": 2},
        ("13f", {"tether": 0.8}),
        (2, 7, 4),
    ),
    "no memory": (
        chunked([3] * 14, noisy=1, context=2),
        {"grid": (1, 2), "batch": 2},
        ("5f", {}),
        (1, 0, 4),
    ),
    "no sink, guided": (
        guided(chunked([2] * 14, noisy=1)),
        {"grid": (1, 3), "heads": 2},
        ("7f", {"sink": 0}),
        (0, 3, 4),
    ),
    "several chunks in flight": (
        rolling(2, 28, 3),
        {"grid": (1, 2), "heads": 2},
        ("9f", {"sink": 2}),
        (2, 3, 4),
    ),
    "a prompt switch": (
        chunked([3] * 14, noisy=1),
        {"grid": (3, 2), "heads": 2, "events": (Event("prompt_switch", 21, "b"),)},
        ("12f", {}),
        (2, 6, 4),
    ),
    "no commit pass": (
        without_commits(chunked([2] * 14)),
        {"grid": (1, 2), "batch": 2},
        ("9f", {}),
        (1, 4, 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(9)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks; in float64, where rounding tells no two frames apart."""
    steps, world, (budget, settings), sizes = CASES[case]
    own = {k: v for k, v in settings.items() if k in ("diversity", "tether")}
    script = TetherScript(*sizes, **own)
    tape = random_tape(steps, dtype=torch.float64, **world)
    equal, total = compare_decisions(tether(budget, **settings), script, tape)
    assert equal == total >= 200
    assert script.events > 2


@pytest.mark.parametrize("case", ["three frames", "no sink, guided"])
@pytest.mark.thinned(2)
def test_outputs_and_rows_are_the_twins(case):
    steps, world, (budget, settings), sizes = CASES[case]
    tape = random_tape([s for s in steps if s.chunk < 6], **world | {"batch": 1, "heads": 2})
    assert_same_as_twin(tether(budget, **settings), TetherScript(*sizes), tape)


def test_the_worked_example():
    """Chunks of 3 in a cache of 21: frames 17, 18, 19 are aside in chunk 7, and compete then."""
    tape = random_tape(chunked([3] * 9, noisy=1), layers=1, heads=1, grid=(1, 2))
    held, read = {}, {}

    def look(view):
        mask = view.read[0]
        rows = view.frame_id[0] if mask is None else view.frame_id[0][mask[0, 0]]
        read[view.step.chunk, view.step.phase] = sorted({*rows.tolist()})

    session = tape.session(preset("tether-cache"), watch=look)
    for step, _ in tape.running(session):
        held[step.chunk] = session.samples[0].stores["cond"][0].frames
    assert held[6] == tuple(range(21))
    assert read[7, "denoise"] == [*range(17), 20]
    assert len(held[7]) == 21 and held[7][:3] == (0, 1, 2) and held[7][-4:] == (20, 21, 22, 23)
    assert {*held[7][3:17]} < {*range(3, 20)}
    assert read[7, "commit"] == [*held[7][:17], 20]
    assert read[8, "denoise"] == [*held[7][:17], 23]


@pytest.mark.parametrize(
    ("budget", "settings", "text"),
    [
        ("9f", {"sink": -1}, "sink"),
        ("9f", {"sink": 2.5}, "sink=2.5 .* neither frames nor a share of the budget"),
        ("9f", {"tether": 1.5}, "tether"),
        ("9f", {"temperature": 0}, "temperature"),
        ({"part": "table", "amount": "9f", "shares": [[1, 1, 1]] * 2}, {}, "uniform"),
        ("4f", {}, "5f"),
    ],
)
def test_settings_that_cannot_be(budget, settings, text):
    with pytest.raises(ValueError, match=text):
        tether(budget, **settings).check(random_tape(chunked([3] * 8)).geometry, 3, 24)
