"""WorldKV against plain Python: what is stored of a chunk, and which chunks are read."""

import math
from operator import mul

import pytest
import torch

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Event
from lightning_kv.data.panorama import poses
from lightning_kv.policies.chunk_distance import pose_distance
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
from lightning_kv.testing.tapes import camera


class WorldScript(Script):
    """The method once more; ``budget`` in rows, ``sink`` in frames; ``late``: once it is full."""

    def __init__(self, tape, budget, sink, by="pose", gap=False, late=True, ratio=0.5):
        self.tape, self.budget, self.sink, self.by, self.gap = tape, budget, sink, by, gap
        self.late, self.ratio, self.far, self.heads = late, ratio, {}, {}
        self.chunks, self.begun, self.halved, self.read, self.picked = {}, {}, {}, {}, set()

    def commit_all(self, streams, step):
        one = streams[0]
        where = one.namespace, one.sample
        chunks = self.chunks.setdefault(where, [])
        chunks.append(step.final)
        size = one.geometry.chunk
        edge = step.final[-1] + 1 - max(6 - size, 0)
        old = [c for c in chunks if c[0] >= 3 and c[-1] < edge]
        done = self.halved.setdefault(where, set())
        if len([c for c in old if c not in done]) > 1:
            self.begun[where] = True
        if not self.begun.get(where):
            return
        for chunk in [c for c in old if c not in done]:
            done.add(chunk)
            if len(chunk) == size > 1:
                for layer in sorted({s.layer for s in streams}):
                    self.halve([s for s in streams if s.layer == layer], chunk)

    def halve(self, streams, chunk):
        def vectors(frame):
            rows = [[r for r in s.rows if r.frame == frame] for s in streams]
            pairs = zip(*rows, strict=True)
            return [torch.cat([s.key(r) for s, r in zip(streams, p, strict=True)]) for p in pairs]

        anchor = vectors(chunk[0])
        mean = sum(anchor) / len(anchor)
        alike = {}
        for frame in chunk[1:]:
            for place, key in enumerate(vectors(frame)):
                lengths = math.sqrt(float(key @ key)) * math.sqrt(float(mean @ mean))
                alike[frame, place] = float(key @ mean) / (lengths + 1e-8)
        count = math.ceil(self.ratio * len(anchor)) * (len(chunk) - 1)
        kept = sorted(alike, key=lambda name: (alike[name], name))[:count]
        for stream in streams:
            names = [(r.frame, r.place) for r in stream.rows]
            pairs = zip(stream.rows, names, strict=True)
            stream.rows = [r for r, name in pairs if name in kept or name not in alike]

    def look(self, stream, step, q, k):
        """What is read in this pass; by keys the first layer decides."""
        where = stream.namespace, stream.sample
        chunks, held = self.chunks.get(where, []), {}
        for row in stream.rows:
            held[row.frame] = held.get(row.frame, 0) + 1
        self.read[where] = set(held)
        if not chunks or (self.late and len(stream.rows) <= self.budget):
            return
        own = min(len(step.frames), stream.geometry.chunk or len(step.frames))
        late = max(0, step.start - max(0, 6 - own))
        old = [c for c in chunks if c[0] >= self.sink and c[-1] < late]
        old = old if self.gap else old[:-1]
        fixed = {f for f in held if f < self.sink or f >= late}
        if not old:
            if len(stream.rows) > self.budget:
                room = self.budget // stream.geometry.tokens - min(self.sink, step.start)
                newest = range(step.start - max(0, room), step.start)
                self.read[where] = {f for f in held if f < self.sink or f in newest}
            return
        if stream.layer == 0 and stream.head == 0:
            self.far[where] = self.distances(stream, step, old, chunks[-1])
        room = self.budget - sum(held[f] for f in fixed)
        for chunk in sorted(old, key=lambda c: (self.far[where][c], c)):
            room -= sum(held.get(f, 0) for f in chunk)
            if room < 0:
                break
            fixed |= {f for f in chunk if f in held}
            self.picked.add((where, step.chunk, chunk))
        self.read[where] = fixed

    def distances(self, stream, step, old, newest):
        if self.by == "keys":
            mine = self.prototype(stream, newest)
            theirs = {c: self.prototype(stream, c) for c in old}
            return {c: 1 - sum(map(mul, own, mine)) for c, own in theirs.items()}
        pose = camera(self.tape.seeds[stream.sample], self.tape.frames).double()
        far, turned = {}, {}
        for chunk in old:
            a, b = (sum(pose[f] for f in c) / len(c) for c in (chunk, step.frames))
            far[chunk] = sum(float(a[i, 3] - b[i, 3]) ** 2 for i in range(3))
            trace = sum(float(a[i, j] * b[i, j]) for i in range(3) for j in range(3))
            turned[chunk] = math.acos(min(1, max(-1, (trace - 1) / 2)))
        tops = [max(x.values()) or 1.0 for x in (far, turned)]
        return {c: far[c] / tops[0] / 2 + turned[c] / tops[1] / 2 for c in old}

    def prototype(self, stream, chunk):
        every = self.heads[stream.namespace, stream.sample]
        total = sum(r.k.double() for s in every for r in s.rows if r.frame in chunk)
        return (total / total.norm()).tolist()

    def gathered(self, streams, step):
        one = streams[0]
        self.heads[one.namespace, one.sample] = [s for s in streams if s.layer == 0]

    def reads(self, stream, step, frame, index, row, current):
        return current or row.frame in self.read[stream.namespace, stream.sample]


def world(budget, **settings):
    own = {"part": "world-kv", "budget": budget, **settings}
    return policy_from_dict({"name": "x", "retain": "half-chunks", "select": own})


# Steps, geometry, budget and settings, the script's: rows, sink, others.
CASES = {
    "no commit pass": (
        without_commits(chunked([3] * 14)),
        {"grid": (1, 2), "heads": 2},
        ("6f", {}),
        (12, 1, {}),
    ),
    "single frames": (
        chunked([1] * 20, noisy=1),
        {"grid": (1, 3), "heads": 2},
        ("9f", {}),
        (27, 1, {}),
    ),
    "three frames": (
        chunked([3] * 14, noisy=1),
        {"grid": (1, 4), "batch": 2, "heads": 2},
        ("9f", {}),
        (36, 1, {}),
    ),
    "from the first old chunk": (
        chunked([3] * 14, noisy=1, context=2),
        {"grid": (1, 3), "heads": 2},
        ("18f", {"start": "paper"}),
        (54, 3, {"late": False}),
    ),
    "pairs, no gap": (
        chunked([2] * 14, noisy=1),
        {"grid": (2, 2), "heads": 2},
        ("40t", {"close_gap": True, "sink": 2}),
        (40, 2, {"gap": True}),
    ),
    "fours, a short last chunk": (
        chunked([4] * 13 + [1], noisy=1),
        {"grid": (1, 2), "heads": 2},
        ("9f", {"sink": 0}),
        (18, 0, {}),
    ),
    "guided": (
        guided(chunked([3] * 14, noisy=1)),
        {"grid": (1, 2), "heads": 2},
        ("8f", {}),
        (16, 1, {}),
    ),
    "by keys, a prompt switch": (
        chunked([3] * 14, noisy=1),
        {"grid": (1, 3), "heads": 2, "events": (Event("prompt_switch", 21, "b"),)},
        ("9f", {"by": "keys"}),
        (27, 1, {"by": "keys"}),
    ),
    "several chunks in flight": (
        rolling(2, 28, 3),
        {"grid": (1, 2), "heads": 2},
        ("9f", {}),
        (18, 1, {}),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(9)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks, what is held and what is read."""
    steps, geometry, (budget, settings), (rows, sink, own) = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, **geometry)
    script = WorldScript(tape, rows, sink, **own)
    equal, total = compare_decisions(world(budget, **settings), script, tape)
    assert equal == total >= 200
    assert len(script.picked) >= 10


@pytest.mark.parametrize("case", ["three frames", "by keys, a prompt switch"])
@pytest.mark.thinned(2)
def test_outputs_and_rows_are_the_twins(case):
    steps, geometry, (budget, settings), (rows, sink, own) = CASES[case]
    steps = [step for step in steps if step.chunk < 8]
    tape = random_tape(steps, **geometry | {"batch": 1})
    assert_same_as_twin(world(budget, **settings), WorldScript(tape, rows, sink, **own), tape)


def test_the_worked_example():
    """Chunks of 3, as the authors' code reads: from chunk 4 on halves of old chunks, and a gap."""
    tape = random_tape(chunked([3] * 11, noisy=1), layers=1, heads=1, grid=(1, 2))
    read = {}

    def look(view):
        mask = view.read[0]
        rows = view.rows_per_frame[0] if mask is None else view.rows_in(mask[:, 0])[0]
        found = {f: n for f, n in zip(view.frames, rows.tolist(), strict=True) if n}
        chunks = {}
        for frame, count in found.items():
            chunks[frame // 3] = chunks.get(frame // 3, 0) + count
        read[view.step.chunk] = chunks

    tape.play(world("18f", start="paper"), watch=look)
    assert [read[n] for n in (1, 2, 3)] == [dict.fromkeys(range(n), 6) for n in (1, 2, 3)]
    assert read[4] == {0: 6, 1: 4, 3: 6} and read[5] == {0: 6, 1: 4, 2: 4, 4: 6}
    assert read[9] == {0: 6, **dict.fromkeys(range(1, 7), 4), 8: 6}
    assert len(read[10]) == 8 and {*read[10]} < {0, *range(1, 8), 9}


def test_the_nearest_pose_wins():
    """A camera on a line that comes back: by place alone; and by angle where it only turns."""
    line = poses(torch.tensor([0, 1, 2, 3, 4, 5, 4, 3, 2]))
    chunks = [range(i, i + 1) for i in range(6)]
    assert pose_distance(line, chunks, [7]).argsort(stable=True).tolist() == [3, 2, 4, 1, 5, 0]
    turning = torch.eye(4).repeat(4, 1, 1)
    for frame, angle in enumerate((0.0, 1.0, 2.0, 1.2)):
        c, s = math.cos(angle), math.sin(angle)
        turning[frame, :2, :2] = torch.tensor([[c, -s], [s, c]])
    found = pose_distance(turning, [range(i, i + 1) for i in range(3)], [3])
    assert found.tolist() == pytest.approx([0.5, 0.5 * 0.2 / 1.2, 0.5 * 0.8 / 1.2], abs=1e-6)


def test_a_pose_for_each_sample_and_none(panorama):
    """Two clips with cameras of their own; without, the need is named."""
    made, text = preset("world-kv@6f"), ["dusk fast n10 left", "noon fast n10 left"]
    cameras = [poses(torch.arange(24.0)), poses(torch.arange(24.0) % 7)]
    both = rollout(panorama, made, text, 24, decode=False, inputs={"pose": cameras})
    alone = rollout(panorama, made, text[1], 24, decode=False, inputs={"pose": cameras[1]})
    torch.testing.assert_close(both.latents[1:], alone.latents, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="side input pose"):
        rollout(panorama, made, text, 24, decode=False)


@pytest.mark.parametrize("wrong", [{"by": "depth"}, {"recent": 0}, {"sink": 2.5}, {"start": "now"}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"out of range|unknown|neither frames"):
        world("9f", **wrong)


def test_recent_frames_are_whole():
    """Those that memory has halved already are not."""
    own = {"part": "half-chunks", "recent": 3}
    made = policy_from_dict({"name": "x", "base": "world-kv", "retain": own})
    with pytest.raises(ValueError, match=r"recent=6 of the select part 'world-kv' contradicts"):
        made.check(random_tape(chunked([3] * 14)).geometry, 3, 42)
