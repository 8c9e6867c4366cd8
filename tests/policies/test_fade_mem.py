"""FadeMem against plain Python, and against worked-out lists of summaries and positions."""

from dataclasses import replace

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


class FadeScript(Script):
    """The method once more, one frame and one row at a time; a list of summaries per stream."""

    def __init__(self, slots, warp=0.3, spread=0.5, window=21):
        self.slots, self.warp, self.spread, self.window = slots, warp, spread, window
        self.merges = 0

    def commit(self, stream, step):
        rows, now = stream.rows, step.final[-1] + 1
        old = [row for row in rows if row.frame not in step.final]
        ids = sorted({row.frame for row in old})
        groups = [[r for r in old if r.frame == f] for f in ids]
        touched = set()
        for frame in step.final:
            groups.append([row for row in rows if row.frame == frame])
            if len(groups) > self.slots:
                self.merge(groups, now, touched)
                self.merges += 1
        order = {row.frame: i for i, row in reversed([*enumerate(rows)])}
        still = [group for group in groups if group[0].frame not in touched]
        stream.rows = [r for g in sorted(still, key=lambda g: order[g[0].frame]) for r in g]
        stream.rows += [r for g in groups if g[0].frame in touched for r in g]

    def merge(self, groups, now, touched):
        warped = [(now - group[0].time) ** self.warp for group in groups]
        best = None
        for i in range(len(groups) - 2):
            gap = abs(warped[i] - warped[i + 1])
            if best is None or gap < best[0]:
                best = gap, i
        i = best[1]
        a, b = groups[i], groups.pop(i + 1)
        wide = a[0].weight + b[0].weight
        if i == 0:
            groups[0] = [row.clone(weight=wide) for row in a]
            return
        share = a[0].weight ** self.spread / (
            a[0].weight ** self.spread + b[0].weight ** self.spread
        )
        time = round((a[0].weight * a[0].time + b[0].weight * b[0].time) / wide)
        groups[i] = [
            row.clone(
                k=share * row.k + (1 - share) * other.k,
                v=share * row.v + (1 - share) * other.v,
                time=float(time),
                weight=wide,
            )
            for row, other in zip(a, b, strict=True)
        ]
        touched.add(a[0].frame)

    def time(self, stream, step, row):
        return step.start - self.lags(stream, step)[row.frame]

    def lags(self, stream, step):
        centre = {r.frame: r.time for r in stream.rows}
        ids = sorted(centre)
        reach = max(self.window - len(step.frames), len(ids))
        if step.start < reach:
            return {f: step.start - centre[f] for f in ids}
        bridge = min(stream.geometry.chunk, len(step.frames), len(ids) - 1)
        middle, new = ids[1 : len(ids) - bridge], ids[len(ids) - bridge :]
        found = {ids[0]: reach} | {f: bridge - i for i, f in enumerate(new)}
        most = reach - 1
        for i, frame in enumerate(middle):
            least = bridge + 1 + len(middle) - 1 - i
            age = min(max(step.start - centre[frame], bridge + 1), reach - 1)
            found[frame] = min(
                range(least, most + 1), key=lambda g: (abs(g**self.warp - age**self.warp), g)
            )
            most = found[frame] - 1
        return found


def fade(budget, window=21, **settings):
    own = {"part": "fade-mem", "budget": budget, **settings}
    places = {"part": "faded", "window": window}
    return policy_from_dict({"name": "x", "retain": own, "positions": places})


# Steps, geometry, slots, settings.
CASES = {
    "as small as it gets, guided": (
        guided(chunked([3] * 14, noisy=1)),
        {"grid": (1, 1), "heads": 2},
        2,
        {},
    ),
    "three frames": (chunked([3] * 14, noisy=1), {"grid": (1, 2), "batch": 2}, 12, {}),
    "single frames": (chunked([1] * 20, noisy=1), {"grid": (2, 3), "heads": 2}, 6, {}),
    "pairs, ages as they are": (
        chunked([2] * 14, noisy=1, context=2),
        {"grid": (1, 5), "heads": 2},
        5,
        {"warp": 1.0},
    ),
    "fours, a short last chunk": (
        chunked([4] * 13 + [1], noisy=1),
        {"grid": (1, 2), "heads": 2},
        9,
        {"spread": 1.0},
    ),
    "several chunks in flight": (rolling(2, 28, 3), {"grid": (1, 2), "heads": 2}, 7, {}),
    "a prompt switch": (
        chunked([3] * 14, noisy=1),
        {"grid": (3, 2), "heads": 2, "events": (Event("prompt_switch", 21, "b"),)},
        8,
        {},
    ),
    "no commit pass": (without_commits(chunked([2] * 14)), {"heads": 4, "grid": (1, 3)}, 4, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(8)
def test_everything_is_the_twins(case):
    """Over 14 chunks: what is held, in float64, and what comes of it."""
    steps, world, slots, settings = CASES[case]
    script = FadeScript(slots, **settings)
    tape = random_tape(steps, dtype=torch.float64, **world)
    policy = fade(f"{slots}f", **settings)
    equal, total = compare_decisions(policy, script, tape, ("kept", "read"))
    assert equal == total >= 200
    assert script.merges > 20
    alone = tape.alone(0)
    short = replace(alone, entries=tuple(e for e in alone.entries if e.step.chunk < 9))
    assert_same_as_twin(policy, FadeScript(slots, **settings), short)


# Of a chunk: summaries as centre and number of frames, and where they are read before 18, 19, 20.
LISTS = {
    1: [(0, 1), (1, 1), (2, 1)],
    4: [(f, 1) for f in range(12)],
    5: [(0, 2), (2, 2), (4, 2), *((f, 1) for f in range(6, 15))],
    6: [*((f, 2) for f in range(0, 12, 2)), *((f, 1) for f in range(12, 18))],
    7: [(0, 4), *((f, 2) for f in range(4, 16, 2)), *((f, 1) for f in range(16, 21))],
    8: [(0, 4), (5, 4), (9, 4), (12, 2), (14, 2), (16, 2), *((f, 1) for f in range(18, 24))],
    10: [
        *((0, 4), (5, 4), (9, 4), (13, 4), (17, 4), (20, 2), (22, 2), (24, 2)),
        *((f, 1) for f in range(26, 30)),
    ],
}
PLACES = {
    6: [0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17],
    7: [0, 1, 3, 5, 7, 9, 11, 13, 14, 15, 16, 17],
    8: [0, 1, 3, 6, 8, 10, 12, 13, 14, 15, 16, 17],
    10: [0, 1, 2, 3, 5, 8, 10, 12, 14, 15, 16, 17],
}


def test_the_worked_example():
    tape = random_tape(chunked([3] * 11, noisy=1), layers=1, heads=1, grid=(1, 2), train_horizon=21)
    lists, places = {}, {}

    def look(view):
        order = view.frame_id[0].argsort(stable=True)[::2]
        time, weight = view.time[0][order].tolist(), view.weight[0][order].tolist()
        lists[view.step.chunk] = list(zip(map(int, time), map(int, weight), strict=True))
        lag = view.lag[:, 0].expand(1, -1)[0][order]
        places[view.step.chunk] = (18 - lag).tolist()

    tape.play(preset("fade-mem"), watch=look)
    assert {chunk: lists[chunk] for chunk in LISTS} == LISTS
    assert {chunk: places[chunk] for chunk in PLACES} == PLACES


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"warp": 0}, "warp"), ({"spread": -1}, "spread"), ({"window": 1}, "window")],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        fade("6f", **settings)


def test_budgets_that_cannot_be():
    geometry = random_tape(chunked([3] * 8)).geometry
    with pytest.raises(ValueError, match="2f"):
        fade("1f").check(geometry, 3, 24)
    with pytest.raises(ValueError, match="uniform"):
        fade({"part": "table", "amount": "9f", "shares": [[1, 1, 1]] * 2}).check(geometry, 3, 24)
