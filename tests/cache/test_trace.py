"""What the trace remembers, against what the decisions say."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from slow import AskAtCommit, Scattered, passes, play, policy, rolling, session, sessions, tape

from lightning_kv.cache.decisions import Retention, Selection, Sums
from lightning_kv.cache.trace import Trace
from lightning_kv.policies.base import SelectPart

LAYERS, HEADS, TOKENS = sessions.GEOMETRY.layers, sessions.GEOMETRY.heads, sessions.GEOMETRY.tokens


def traced(made, steps, batch=1):
    trace = Trace()
    on = session(made, batch, watch=trace)
    play(on, tape(steps, batch))
    return trace, on


def byte(share):
    return round(255 * min(1.0, share))


def test_a_window_is_held_and_read_whole():
    trace, _ = traced(policy(retain={"part": "window", "budget": "3f", "sink": 1}), passes(5))
    found = trace.arrays(0)
    assert {name: x.dtype for name, x in found.items()} == {
        "held": np.uint8,
        "read": np.uint8,
        "weight": np.float16,
    }
    assert found["held"].shape == found["weight"].shape == (5, LAYERS, HEADS, 10)
    assert found["read"].shape == (5, 1, LAYERS, HEADS, 10)
    for chunk in range(5):
        frames = list(range(2 * chunk))
        frames = frames if len(frames) <= 3 else [0, *frames[-2:]]
        expected = [f in frames for f in range(10)]
        for name, scale in (("held", 255), ("weight", 1)):
            assert (found[name][chunk] == scale * np.array(expected)).all()
        assert (found["read"][chunk, 0] == 255 * np.array(expected)).all()


@dataclass(frozen=True)
class Picky(SelectPart):
    """Query frame f of head h reads the frames of its parity; all frames in the first pass."""

    refresh: str = "pass"

    def pick(self, view, state):
        if view.step.opens:
            return None
        head = torch.arange(view.heads).view(-1, 1, 1)
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        frames = (view.frame_ids.view(1, 1, -1) + query + head + view.layer) % 2 == 0
        return Selection(frames=frames)


def test_reads_of_each_query_frame_are_the_mean_over_passes():
    """Three passes: the first reads everything, the others what the query frame's parity says."""
    trace, on = traced(policy(select=Picky()), passes(4), batch=2)
    for sample in range(2):
        found = trace.arrays(sample)
        assert found["read"].shape == (4, 2, LAYERS, HEADS, 8)
        for chunk, query, layer, head, frame in np.ndindex(found["read"].shape):
            there = frame < 2 * chunk
            hit = (frame + 2 * chunk + query + head + layer) % 2 == 0
            expected = byte(there * (1 + 2 * hit) / 3)
            assert found["read"][chunk, query, layer, head, frame] == expected
    total = found["read"].astype(float).sum() / 255 * 3 * TOKENS * TOKENS
    assert on.costs[0].rows_read == pytest.approx(total, rel=0.01)


@dataclass(frozen=True)
class ByPlace(SelectPart):
    """Query frame j of head h reads rows whose place, frame, head and j agree."""

    ragged: bool = True

    def pick(self, view, state):
        head, query = torch.arange(view.heads).view(-1, 1, 1), torch.arange(view.query_frames)
        own = view.frame_id.unsqueeze(1), view.raster.unsqueeze(1)
        rows = self.hit(*own, head, query.view(1, -1, 1))
        return Selection(rows=rows if self.ragged else rows[:1])

    def hit(self, frame, place, head, query):
        head = head if self.ragged else 0
        return (frame + 2 * place + head + query) % 3 > 0


@pytest.mark.parametrize("ragged", [True, False])
def test_reads_of_single_rows_are_shares_of_a_frame(ragged):
    """One mask per head over rows that differ from head to head; or one for all heads."""
    part = ByPlace(ragged=ragged)
    retain = Scattered() if ragged else "everything"
    trace, _ = traced(policy(retain=retain, select=part), passes(5, noisy=1))
    found, partial = trace.arrays(0), 0
    for chunk, layer, head, frame in np.ndindex(found["held"].shape):
        # After its commit a chunk is scattered too: what is held is what stays every time.
        stay = [
            p
            for p in range(TOKENS)
            if frame < 2 * chunk and (not ragged or Scattered().stays(frame, p, head, layer))
        ]
        assert found["held"][chunk, layer, head, frame] == byte(len(stay) / TOKENS)
        assert found["weight"][chunk, layer, head, frame] == len(stay) / TOKENS
        for query in range(2):
            read = sum(bool(part.hit(frame, p, head, query)) for p in stay)
            assert found["read"][chunk, query, layer, head, frame] == byte(read / TOKENS)
            partial += 0 < read < TOKENS
    assert partial


def fold(views):
    """The older chunk goes into the newest, place by place, in every head but the first."""
    if views[0].step.chunk != 1:
        return [None] * len(views)
    rows = torch.arange(2 * sessions.CHUNK * TOKENS).unsqueeze(0)
    half = rows.shape[1] // 2
    head = torch.arange(HEADS).unsqueeze(1)
    own = [views[0].field(name)[:, half:] for name in ("frame_id", "time", "place")]
    frames = torch.where(head == 0, -1, own[0])
    source = torch.where(head == 0, -1, rows)
    pairs = source, rows % half, torch.full(rows.shape, 0.5)
    keep = (head == 0).expand(-1, rows.shape[1])
    return [Retention(keep=keep, sums=Sums(*pairs, frames, *own[1:]))] * len(views)


def test_merged_rows_weigh_the_tokens_they_stand_for():
    """Held and weight differ: half the rows, the same number of tokens."""
    made = policy(retain=AskAtCommit(question=fold), bias="log_weight")
    found = traced(made, passes(4))[0].arrays(0)
    for chunk in (2, 3):
        for frame in range(6):
            made_by = frame < 2 * chunk
            first = float(made_by)
            other = {0: 0.0, 1: 0.0, 2: 2.0, 3: 2.0}.get(frame, first)
            assert (found["weight"][chunk, :, 0, frame] == first).all()
            assert (found["weight"][chunk, :, 1:, frame] == other).all()
            assert (found["held"][chunk, :, 0, frame] == 255 * first).all()
            assert (found["held"][chunk, :, 1:, frame] == 255 * (other > 0) * made_by).all()
            assert (found["read"][chunk, 0, :, 1:, frame] == 255 * (other > 0) * made_by).all()


@dataclass(frozen=True)
class Always(SelectPart):
    """By parity in every pass."""

    def pick(self, view, state):
        head = torch.arange(view.heads).view(-1, 1, 1)
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        return Selection(frames=(view.frame_ids.view(1, 1, -1) + query + head) % 2 == 0)


def test_several_chunks_in_flight_are_put_together():
    """Four query frames while denoising, two in the commit pass: those count on average."""
    trace, _ = traced(policy(select=Always()), rolling(4, 2))
    found = trace.arrays(0)
    assert found["read"].shape == (4, 4, LAYERS, HEADS, 10)
    for chunk, query, layer, head, frame in np.ndindex(found["read"].shape):
        one = (frame + 2 * chunk + query + head) % 2 == 0
        expected = (one + 0.5) / 2 if frame < 2 * chunk else 0.0  # one of two commit queries reads
        assert abs(int(found["read"][chunk, query, layer, head, frame]) - 255 * expected) <= 1


def test_chunks_with_fewer_query_frames_count_on_average():
    """Four frames in flight at first, two in the last chunk."""
    early = [step for step in rolling(2, 2) if step.chunk < 2]
    late = [step for step in passes(3, noisy=1) if step.chunk == 2]
    found = traced(policy(select=Always()), early + late)[0].arrays(0)
    assert found["read"].shape == (3, 4, LAYERS, HEADS, 6)
    for layer, head, frame in np.ndindex(LAYERS, HEADS, 6):
        for query in range(4):
            assert abs(int(found["read"][2, query, layer, head, frame]) - 127.5 * (frame < 4)) <= 1
            one = (frame + 2 + query + head) % 2 == 0
            expected = 255 * (one + 0.5) / 2 * (frame < 2)
            assert abs(int(found["read"][1, query, layer, head, frame]) - expected) <= 1


def test_only_the_cond_namespace_is_watched_and_rebuilds_are_not():
    once, _ = traced(policy(), passes(3))
    trace = Trace()
    on = session(policy(), watch=trace)
    play(on, tape(passes(3)))
    play(on, [(replace(step, namespace="uncond"), *x) for step, *x in tape(passes(5))])
    assert all((once.arrays(0)[n] == x).all() for n, x in trace.arrays(0).items())
    again = next(s for s in passes(3) if s.final)
    for layer in range(LAYERS):
        x = torch.zeros(1, 2 * TOKENS, HEADS, 12)
        on.attend(layer, x, x, x, replace(again, rebuild=True, chunk=9))
    assert len(trace.arrays(0)["held"]) == 3


def test_watching_changes_nothing():
    made = policy(select={"part": "focused", "budget": "3f"})
    recorded = tape(passes(5))
    plain, watched = (play(session(made, watch=watch), recorded) for watch in (None, Trace()))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_sample_nobody_watched_has_no_chunks():
    found = Trace().arrays(0)
    assert found["held"].shape[0] == found["read"].shape[0] == 0
