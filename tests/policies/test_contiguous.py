"""What is read stands side by side, for every head and query frame by itself."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import Ask, Scattered, agree, passes, play, policy, rolling, session, tape

from lightning_kv.cache.decisions import Selection
from lightning_kv.testing import Script

READ = {"part": "contiguous", "of": "read"}


def reads(frame, layer, head, query):
    """What looks like a random choice."""
    return (frame * 7 + layer * 3 + head * 5 + query) % 3 > 0


def question(apart, heads):
    """A selection by it; query frames read the same unless ``apart``."""

    def answer(view):
        if not len(view):
            return None
        ids, frames = view.frame_ids.tolist(), view.step.frames if apart else (0,)
        each = [
            [[reads(f, view.layer, h, q) for f in ids] for q in frames]
            for h in range(view.heads if heads else 1)
        ]
        return Selection(frames=torch.tensor(each, dtype=torch.bool))

    return answer


class ReadScript(Script):
    """Ranks among the frames that are read."""

    def __init__(self, apart, heads, retain=None):
        self.apart, self.heads, self.retain = apart, heads, retain

    def chosen(self, stream, row, frame):
        return reads(
            row.frame, stream.layer, stream.head if self.heads else 0, frame if self.apart else 0
        )

    def commit(self, stream, step):
        if self.retain:
            own = (stream.head, stream.layer)
            stream.rows = [r for r in stream.rows if self.retain.stays(r.frame, r.place, *own)]

    def reads(self, stream, step, frame, index, row, current):
        return current or self.chosen(stream, row, frame)

    def time_for(self, stream, step, row, frame):
        every = {r.frame for r in stream.rows if self.chosen(stream, r, frame)}
        return (
            step.start - 1 - sorted(every, reverse=True).index(row.frame)
            if row.frame in every
            else 0
        )


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("steps", [passes(5, noisy=1), rolling(4, 2)], ids=["chunks", "rolling"])
def test_ranks_among_what_is_read(apart, heads, steps):
    steps = list(steps)
    made = policy(select=Ask(question=question(apart, heads)), positions=READ)
    agree(made, ReadScript(apart, heads), tape(steps))


def test_heads_that_hold_other_rows():
    retain, steps = Scattered(share=0.4), passes(5, noisy=1)
    made = policy(retain=retain, select=Ask(question=question(True, True)), positions=READ)
    agree(made, ReadScript(True, True, retain), tape(steps))


def test_where_everything_is_read_it_is_contiguous():
    found = [policy(positions=name) for name in (READ, "contiguous")]
    recorded = tape(passes(4, noisy=1))
    one, other = (play(session(made), recorded) for made in found)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
