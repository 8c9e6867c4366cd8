"""Parts against scripts of a few lines: at any geometry, over streams, layers and namespaces."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from parts import Longest, budgeted, policy

from lightning_kv.cache.decisions import Event, Rebuild, Retention, Selection
from lightning_kv.policies.base import RetainPart, SelectPart, UnitPart
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
    turn,
    without_commits,
)


class LongestScript(Script):
    """What the part says in tensors, in plain Python, stream by stream."""

    def commit(self, stream, step):
        length = {}
        for row in stream.rows:
            length[row.frame] = length.get(row.frame, 0.0) + float(row.k.norm())
        newest = [frame for frame in length if frame >= step.final[0]]
        rest = sorted((f for f in length if f not in newest), key=length.get, reverse=True)
        kept = newest + rest[: 4 - len(newest)]
        stream.rows = [row for row in stream.rows if row.frame in kept]


def test_a_part_of_a_few_lines():
    made = policy(budgeted(Longest, "4f"))
    tape = random_tape(chunked((2,) * 6, noisy=1))
    assert_same_as_twin(made, LongestScript(), tape)
    assert compare_decisions(made, LongestScript(), tape) == (36, 36)  # commits x layers x heads


@dataclass(frozen=True)
class Snap(UnitPart):
    """Keep the rows that the queries of the last clean pass looked at (SnapKV, 2404.14469)."""

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    granularity: str = "token"

    def observe(self, view, state):
        held, own = (x[:, 0] for x in view.attention())
        state[view.layer] = view.joint(held, own)

    def scores(self, view, state):
        return state[view.layer].unsqueeze(1)


class SnapScript(Script):
    """The same, row by row."""

    def __init__(self, rows):
        self.count = rows

    def commit(self, stream, step):
        mass = [0.0] * len(stream.rows)
        for query in stream.queries:
            parts = [math.exp(x) for x in stream.logits(query, stream.rows)]
            mass = [m + part / sum(parts) for m, part in zip(mass, parts, strict=True)]
        newest = [row.frame >= step.final[0] for row in stream.rows]
        order = sorted(range(len(mass)), key=lambda i: (not newest[i], -mass[i], i))
        kept = set(order[: max(self.count, sum(newest))])
        stream.rows = [row for i, row in enumerate(stream.rows) if i in kept]


TAPES = {
    "pairs": random_tape(chunked((2,) * 4, 1), grid=(2, 2)),
    "one frame at a time": random_tape(chunked((1,) * 6, 1), layers=3, heads=2, grid=(1, 5)),
    "wide heads": random_tape(chunked((2,) * 4, 1), heads=1, head_dim=16, grid=(3, 1)),
    "short ends": random_tape(chunked((1, 3, 3, 1), 1), grid=(1, 3)),
    "two namespaces": random_tape(guided(chunked((2,) * 4, 1)), grid=(1, 3)),
    "two samples": random_tape(chunked((2,) * 4, 1), layers=1, grid=(2, 2), batch=2),
    "given": random_tape(chunked((2,) * 4, 1, context=2), grid=(1, 3)),
}


@pytest.mark.parametrize("name", TAPES)
def test_what_the_last_queries_looked_at(name):
    """Queries of the commit pass, keys of all that is held: at every geometry."""
    tape = TAPES[name]
    rows = 3 * tape.geometry.chunk * tape.geometry.tokens // 2
    made = policy(retain=budgeted(Snap, f"{rows}t"))
    assert_same_as_twin(made, SnapScript(rows), tape)
    streams = len({s.namespace for s in tape.steps}) * tape.batch
    streams *= tape.geometry.layers * tape.geometry.heads
    chunks = len({s.chunk for s in tape.steps})
    assert compare_decisions(made, SnapScript(rows), tape) == (streams * chunks,) * 2


def test_another_rule_is_found_decision_by_decision():
    """The first commit has nothing to drop; later ones differ where the rule does."""
    tape, rows = TAPES["pairs"], 12
    made = policy(retain=budgeted(Snap, f"{rows}t"))

    class Newest(SnapScript):
        def commit(self, stream, step):
            stream.rows = stream.rows[-self.count :]

    equal, total = compare_decisions(made, Newest(rows), tape)
    assert total == 4 * 6 and 6 <= equal < total
    with pytest.raises(AssertionError, match=r"denoise pass of frames \(4, 5\), layer 0"):
        assert_same_as_twin(made, Newest(rows), tape)


def test_rows_that_nobody_has_read_are_found():
    """Outputs agree to the end; memory does not."""

    class TooFew(Script):
        def commit(self, stream, step):
            if step.next_chunk == 0:
                stream.rows.pop()

    with pytest.raises(AssertionError, match="cond, sample 0, layer 0, head 0: 24 rows held, 23"):
        assert_same_as_twin(policy(), TooFew(), random_tape(chunked((2, 2), 1)))


@dataclass(frozen=True)
class FirstLayerDecides(RetainPart):
    """All layers and heads keep the frames that the first layer's keys say."""

    def commit(self, views, state):
        own = views[0]
        length = own.by_frame(own.keys("raw").norm(dim=-1).unsqueeze(1)).sum((0, 1))
        keep = length.argsort(descending=True)[:3]
        frames = torch.zeros_like(length, dtype=torch.bool)
        frames[keep] = True
        return [Retention(keep=view.rows_of(frames.unsqueeze(0))) for view in views]


class FirstLayerScript(Script):
    def commit_all(self, streams, step):
        total = {}
        for row in (row for s in streams if s.layer == 0 for row in s.rows):
            total[row.frame] = total.get(row.frame, 0.0) + float(row.k.norm())
        kept = sorted(total, key=total.get, reverse=True)[:3]
        for stream in streams:
            stream.rows = [row for row in stream.rows if row.frame in kept]


@pytest.mark.parametrize("settings", [{}, {"backend": "reference"}, {"buffers": "keep"}], ids=str)
def test_one_layer_decides_for_all(settings):
    tape = random_tape(chunked((2,) * 4, 1), grid=(1, 3), batch=2)
    assert_same_as_twin(policy(retain=FirstLayerDecides()), FirstLayerScript(), tape, **settings)


@dataclass(frozen=True)
class OwnParity(SelectPart):
    """Query frame f of head h reads the frames of its parity."""

    def pick(self, view, state):
        head = torch.arange(view.heads).view(-1, 1, 1)
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        return Selection(frames=(view.frame_ids.view(1, 1, -1) + query + head) % 2 == 0)


class OwnParityScript(Script):
    def reads(self, stream, step, frame, index, row, current):
        return current or (row.frame + frame + stream.head) % 2 == 0


@pytest.mark.parametrize("commits", [True, False], ids=["commit pass", "no commit pass"])
def test_what_is_read_is_counted_by_query_frame(commits):
    steps = rolling(2, 8, 2) if commits else without_commits(rolling(2, 8, 2))
    tape = random_tape(steps, layers=1, grid=(1, 3))
    made = policy(select=OwnParity())
    assert_same_as_twin(made, OwnParityScript(), tape)
    queries = sum(len(step.frames) for step in tape.steps)
    assert compare_decisions(made, OwnParityScript(), tape) == (3 * queries,) * 2
    equal, total = compare_decisions(made, Script(), tape)
    assert total == 3 * queries and equal < total


# -- events and rebuilds ---------------------------------------------------------------------


class RecacheScript(Script):
    """A window of 4 frames; at a prompt switch what is in reach is made again."""

    def __init__(self, together):
        self.together = together

    def commit(self, stream, step):
        frames = sorted({row.frame for row in stream.rows})
        kept = frames[:1] + frames[1:][-3:]
        stream.rows = [row for row in stream.rows if row.frame in kept]

    def event(self, event, streams, step):
        if event.kind != "prompt_switch":
            return None
        made, reach = step.start, step.start - 6 + self.together
        hold, both = tuple(range(made - 3, made)), self.together
        return Rebuild(tuple(range(reach, made)), hold=hold, spare=(0,), together=both, read=both)


@pytest.mark.parametrize("switch", ["recache", "recache-causal"])
@pytest.mark.parametrize("namespaces", [1, 2])
def test_frames_are_encoded_again_at_a_prompt_switch(namespaces, switch):
    events = (Event("prompt_switch", 8, "another"), Event("scene_cut", 10))
    steps = chunked((2,) * 7, 1) if namespaces == 1 else guided(chunked((2,) * 7, 1))
    tape = random_tape(steps, layers=1, heads=2, grid=(1, 3), events=events)
    retain = {"part": "window", "sink": 1, "budget": "4f", "switch": switch}
    script = RecacheScript(switch == "recache")
    session, twin = assert_same_as_twin(policy(retain=retain), script, tape)
    assert session.samples[0].stores["cond"][0].frames == (0, 11, 12, 13)
    assert len(twin.branches) == namespaces


def test_the_twin_turns_as_complex_numbers_do():
    """Pair by pair: the first pairs with time, then rows, then columns, each with its own base."""
    geometry = TAPES["wide heads"].geometry  # 8 + 4 + 4 real dimensions
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = turn(geometry, x, 2.5, (3, 4.5))
    time, row, column = ([(at, width, j) for j in range(width // 2)] for at, width in
                         ((2.5, 8), (3, 4), (4.5, 4)))  # fmt: skip
    for pair, (position, width, j) in enumerate(time + row + column):
        angle = position / 10000.0 ** (2 * j / width)
        a, b = x[2 * pair].item(), x[2 * pair + 1].item()
        expected = (
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        )
        assert found[2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected)
    assert torch.allclose(turn(geometry, found, 2.5, (3, 4.5), sign=-1), x.double())
