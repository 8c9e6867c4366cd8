"""The random control: which frames it always reads, however many are in flight."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slow import Ask, play, policy, rolling, session, tape, world

from lightning_kv.policies.registry import build_part
from lightning_kv.testing import chunked


def reads(monkeypatch, steps, budget):
    """What is held and what is read of it, pass by pass."""
    world(monkeypatch, (1, 2), 3, known=True)
    part, seen = build_part("select", {"part": "random", "budget": f"{budget}f"}), []

    def question(view):
        chosen = part.pick(view, {})
        if chosen is not None:
            (own,) = chosen.frames[:, 0].tolist()
            frames = [f for f, read in zip(view.frames, own, strict=True) if read]
            seen.append((view.step, view.frames, frames))
        return chosen

    play(session(policy(select=Ask(question=question))), tape(steps))
    return seen


@pytest.mark.parametrize("budget", [3, 5])
def test_with_many_chunks_in_flight_three_frames_are_always_read(budget, monkeypatch):
    """15 frames in flight, the oldest 3 of which are committed: those before them are read."""
    seen = reads(monkeypatch, rolling(5, flight=5), budget)
    assert {len(step.frames) for step, *_ in seen} == {15, 3}
    drawn = {}
    for step, frames, read in seen:
        assert len(read) == budget
        assert read[-3:] == list(range(step.start - 3, step.start)) == list(frames[-3:])
        drawn.setdefault(step.chunk, set()).add(tuple(read))
    assert all(len(choices) == 1 for choices in drawn.values()), "drawn once per chunk"
    if budget > 3:
        assert any(read[: budget - 3] != list(range(budget - 3)) for *_, read in seen)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_short_last_chunk_reads_the_whole_chunk_before_it(last, monkeypatch):
    seen = reads(monkeypatch, chunked([3, 3, 3, 3, last], 1), 4)
    ends = [read for step, _, read in seen if step.chunk == 4]
    assert ends and all(read[-3:] == [9, 10, 11] and len(read) == 4 for read in ends)
