"""Pyramid Forcing against plain Python: what each kind of head keeps, merges, reads and when."""

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.policies.tables import shipped
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    held_rows,
    random_tape,
    rolling,
)
from lightning_kv.testing.twin import Row

LABELS = (("wave", "anchor", "veil"), ("veil", "wave", "wave"))
SMALL = {"wave_sink": 1, "sink": 2, "recent": 3, "period": 2, "stride": 3, "block": 2, "slots": 2}


class PyramidScript(Script):
    """The method once more: one row of one head at a time."""

    def __init__(self, chunk, patch=2, lag=8, **settings):
        paper = {"recent": 4, "period": 6, "stride": 6, "block": 4, "slots": 4}
        self.own = {"wave_sink": 1, "sink": 3} | paper | settings
        self.chunk, self.patch, self.lag, self.made = chunk, patch, lag, 0

    def kind(self, stream):
        return LABELS[stream.layer][stream.head]

    def sink(self, stream):
        return self.own["wave_sink" if self.kind(stream) == "wave" else "sink"]

    def near(self, stream, row, start):
        old = max(0, self.own["recent"] - self.chunk)
        return row.weight < 2 and self.sink(stream) <= row.frame and start - old <= row.frame

    def commit(self, stream, step):
        own, kind, made = self.own, self.kind(stream), step.final[-1] + 1
        frames = sorted({row.frame for row in stream.rows})
        if kind == "wave":
            middle = set(frames[-own["period"] * own["slots"] :])
        elif kind == "anchor":
            every = [f for f in range(made) if f % own["stride"] == 0]
            middle = set(every[-own["slots"] :])
        else:
            self.merge(stream, made)
            middle = {f for f in frames if f // own["block"] == made // own["block"]}
        blocks = sorted({row.frame for row in stream.rows if row.weight > 1})
        gone = blocks[: max(0, len(blocks) - own["slots"])]
        stream.rows = [
            row
            for row in stream.rows
            if (row.weight > 1 and row.frame not in gone)
            or (
                row.weight < 2
                and (
                    row.frame < self.sink(stream)
                    or row.frame in middle
                    or self.near(stream, row, made)
                )
            )
        ]

    def merge(self, stream, made):
        size, (high, wide) = self.own["block"], stream.geometry.grid
        there = {(row.frame, row.place): row for row in stream.rows if row.weight < 2}
        known = {row.frame for row in stream.rows if row.weight > 1}
        for block in range(made // size):
            frames = list(range(block * size, block * size + size))
            name = (frames[0] + frames[-1]) // 2
            if frames[0] < self.own["sink"] or name in known or (frames[0], 0) not in there:
                continue
            if any((f, 0) not in there for f in frames):
                continue
            for top in range(0, high, self.patch):
                for left in range(0, wide, self.patch):
                    spots = [
                        (y, x)
                        for y in range(top, min(top + self.patch, high))
                        for x in range(left, min(left + self.patch, wide))
                    ]
                    rows = [there[f, y * wide + x] for f in frames for y, x in spots]
                    centre = tuple(sum(spot[i] for spot in spots) / len(spots) for i in (0, 1))
                    mean = [sum(getattr(row, kv) for row in rows) / len(rows) for kv in "kv"]
                    stream.rows.append(Row(name, float(name), centre, *mean, weight=len(rows)))

    def reads(self, stream, step, frame, index, row, current):
        if current or self.near(stream, row, step.start):
            return True
        own, kind, merged = self.own, self.kind(stream), row.weight > 1
        if not merged and row.frame < self.sink(stream):
            return True
        if kind == "veil":
            last = row.frame // own["block"] * own["block"] + own["block"] - 1
            return merged and last < frame - own["recent"] + 1
        step_of = {"wave": frame % own["period"], "anchor": 0}[kind]
        every = own["period"] if kind == "wave" else own["stride"]
        return row.frame % every == step_of and row.frame < frame - own["recent"] + 1

    def time_for(self, stream, step, row, frame):
        if self.near(stream, row, step.start):
            return row.time
        earliest = frame - self.lag
        return max(row.time if row.weight > 1 else 0.0, earliest)


def policy(lag=None, patch=2, **settings):
    both = {"labels": LABELS, **settings}
    return policy_from_dict({
        "name": "x",
        "retain": {"part": "pyramid-forcing", "patch": patch, **both},
        "select": {"part": "pyramid-reads", **both},
        "positions": {"part": "pyramid-times", "lag": lag, **both},
    })  # fmt: skip


CASES = {
    "the paper's": ({}, {}, chunked([3] * 14, noisy=1), 3, {"grid": (2, 2)}),
    "singles": (SMALL, {}, chunked([1] * 15, noisy=1), 1, {"grid": (2, 2)}),
    "pairs, an odd grid, a given chunk": (
        SMALL,
        {"patch": 3, "lag": 5},
        chunked([2] * 14, noisy=1, context=1),
        2,
        {"grid": (2, 5), "batch": 1},
    ),
    "fours, a short last chunk": (
        SMALL | {"recent": 5, "block": 3, "sink": 0, "wave_sink": 0},
        {"lag": 4},
        chunked([4] * 13 + [1], noisy=1),
        4,
        {"grid": (1, 3)},
    ),
    "a shorter first chunk": (
        SMALL,
        {},
        chunked([1] + [3] * 13, noisy=1),
        3,
        {"grid": (2, 1)},
    ),
    "a prompt switch": (
        SMALL | {"slots": 1},
        {},
        chunked([3] * 14, noisy=1),
        3,
        {"grid": (1, 2), "events": (Event("prompt_switch", 12, "a"),)},
    ),
    "guided": (SMALL, {}, guided(chunked([2] * 14, noisy=1)), 2, {"grid": (1, 2), "batch": 1}),
    "several chunks in flight": (SMALL, {}, rolling(2, 28, 3), 2, {"grid": (1, 2)}),
}


def case(name, dtype=torch.float64):
    settings, more, steps, chunk, world = CASES[name]
    tape = random_tape(steps, dtype=dtype, heads=3, **{"batch": 2} | world)
    script = PyramidScript(chunk, **{"lag": tape.geometry.train_horizon} | more, **settings)
    return policy(**more, **settings), script, tape


@pytest.mark.parametrize("name", sorted(CASES, key=lambda name: name != "singles"))
@pytest.mark.thinned(20)
def test_every_decision_is_the_twins(name):
    found = compare_decisions(*case(name))
    assert found.total >= 150 and found.equal == found.total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_outputs_and_rows_are_the_twins(name):
    assert_same_as_twin(*case(name, torch.float32))


def test_the_worked_example():
    """What the first query frame of a chunk reads beside the chunk, section 5.5."""
    tape = random_tape(chunked([3] * 7, noisy=1), layers=1, heads=3, grid=(2, 2))
    made = policy_from_dict({
        "name": "x",
        "retain": {"part": "pyramid-forcing", "labels": LABELS[:1]},
        "select": {"part": "pyramid-reads", "labels": LABELS[:1]},
    })  # fmt: skip
    seen = {}

    def look(view):
        if view.step.opens:
            rows, ids = view.selection.rows, view.frame_id.expand(3, -1)
            frames = [
                [int(f) for f, on in zip(ids[h], rows[h, 0], strict=True) if on] for h in range(3)
            ]
            seen[view.step.start] = [{f: own.count(f) for f in sorted(set(own))} for own in frames]

    tape.play(made, watch=look)
    middle = {
        3: ([2], [], []),
        6: ([5], [5], [5]),
        9: ([3, 8], [8], [8]),
        12: ([6, 11], [6, 11], [11]),
        15: ([3, 9, 14], [6, 14], [14]),
        18: ([6, 12, 17], [6, 12, 17], [17]),
    }
    blocks = {12: [5], 15: [5, 9], 18: [5, 9]}
    for start, (wave, anchor, veil) in middle.items():
        expected = [
            dict.fromkeys([0, *wave], 4),
            dict.fromkeys([0, 1, 2, *anchor], 4),
            dict.fromkeys([0, 1, 2, *veil], 4) | dict.fromkeys(blocks.get(start, ()), 1),
        ]
        assert seen[start] == expected, start


def test_what_is_held_when_full():
    """Wave 1 + 24 frames, anchor 3 + 4 + 1, veil 3 + 4 blocks of a quarter and an open block."""
    tape = random_tape(chunked([3] * 14, noisy=1), layers=1, heads=3, grid=(2, 2))
    made = policy_from_dict(
        {"name": "x", "retain": {"part": "pyramid-forcing", "labels": LABELS[:1]}}
    )
    session = tape.session(made)
    for _ in tape.running(session):
        pass
    table = session.samples[0].stores["cond"][0].table
    rows = [len(held_rows(table, head)) for head in range(3)]
    assert rows == [4 * 25, 4 * (3 + 4 + 1), 4 * (3 + 2) + 4]  # 42 frames: 40 and 41 wait


def test_the_authors_labels():
    rows = shipped()["pyramid-forcing-self-forcing"].rows
    assert [sum(row.count(kind) for row in rows) for kind in ("wave", "anchor", "veil")] == [
        156,
        172,
        32,
    ]
    numbers = [[-1, 1, 2], [2, -1, -1]]
    assert (
        policy_from_dict(
            {"name": "x", "retain": {"part": "pyramid-forcing", "labels": numbers}}
        ).retain.labels.rows
        == LABELS
    )
    assert preset("pyramid-forcing").positions.labels.auto == "pyramid-forcing"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"block": 1}, "block"),
        ({"patch": 0}, "patch"),
        ({"lag": 0}, "lag"),
        ({"labels": [["ripple"]]}, r"wave \(-1\), anchor \(1\), veil \(2\)"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(**settings)


@pytest.mark.parametrize(
    "kind, settings",
    [("retain", {"period": 4}), ("positions", {"recent": 3}), ("select", {"labels": [["veil"]]})],
)
def test_parts_that_contradict_each_other(kind, settings):
    """What one keeps the others would look for elsewhere."""
    name, geometry = next(iter(settings)), random_tape(chunked([3] * 8)).geometry
    made = policy_from_dict({"name": "x", "base": "pyramid-forcing", kind: settings})
    with pytest.raises(ValueError, match=f"{name}=.* contradicts {name}=.*Give both the same") as e:
        made.check(geometry, 3, 24)
    assert f"`{kind}`" in str(e.value)
    both = dict.fromkeys(("retain", "select", "positions"), settings)
    alike = policy_from_dict({"name": "x", "base": "pyramid-forcing", **both})
    alike.retain.suits(alike)
