"""The random controls: what they always read or keep, and that the rest is drawn evenly."""

import math
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slow import Ask, play, policy, rolling, session, tape, world

from lightning_kv.policies.registry import build_part, policy_from_dict, preset
from lightning_kv.testing import chunked, random_tape
from lightning_kv.testing.compare import Decisions, spots


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


def test_random_memory_holds_every_past_frame_equally_often():
    """A reservoir: 120 samples, each frame of the past within four deviations of its share."""
    policy = preset("random-memory@8f")
    tape = random_tape(
        chunked([3] * 8, noisy=1), layers=1, heads=1, head_dim=6, grid=(1, 1), batch=120
    )
    session = tape.session(policy)
    for step, _ in tape.running(session):
        if not step.final or step.chunk < 3:
            continue
        held = [cache.stores["cond"][0].frames for cache in session.samples]
        assert all(len(own) == 8 and own[-3:] == step.final for own in held)
        past, share = step.start, 5 / step.start
        counts = Counter(frame for own in held for frame in own[:-3])
        spread = math.sqrt(120 * share * (1 - share))
        for frame in range(past):
            assert abs(counts[frame] - 120 * share) <= 4 * spread + 1e-9, (step.chunk, frame)


def test_random_memory_is_one_draw_for_all_heads_layers_and_times():
    """Equal to a sort of one keyed number per frame; a frame that is dropped never comes back."""
    tape = random_tape(chunked([2] * 9), layers=2, heads=3, batch=2)
    session, seen = tape.session(preset("random-memory@5f")), {}
    for step, _ in tape.running(session):
        if not step.final:
            continue
        for cache in session.samples:
            seed = session.seeds[cache.index]
            rank = sorted(
                range(step.start), key=lambda f, s=seed: -random.Random(f"{s} frame {f}").random()
            )
            kept = tuple(sorted((*rank[:3], *step.final)))
            assert {store.frames for store in cache.stores["cond"]} == {kept}
            seen.setdefault(cache.index, []).append(kept)
    assert seen[0] != seen[1], "samples draw apart"


BUDGETS = {"6f": 36, "9f": 54, "15f": 90, "100t": 100}


def control(kind, granularity, budget):
    """A policy of a control alone."""
    part = {"retain": "random-memory", "select": "random"}[kind]
    own = {"part": part, "granularity": granularity, "budget": budget}
    return policy_from_dict({"name": "x", kind: own})


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("granularity", ["frame", "token"])
@pytest.mark.parametrize("kind", ["retain", "select"])
@pytest.mark.thinned(5)
def test_controls_keep_to_any_budget(kind, granularity, budget):
    """As many rows as the budget says, the newest chunk among them; the same in all heads."""
    tape = random_tape(chunked([3] * 9, noisy=1), layers=2, heads=2)
    found = Decisions()
    session = tape.session(control(kind, granularity, budget), watch=found)
    for step, _ in tape.running(session):
        if step.final:
            found.commit(session, step)
    most = BUDGETS[budget] if granularity == "token" else BUDGETS[budget] // 6 * 6
    seen = {"retain": found.kept, "select": found.read}[kind]
    sets, newest = {}, {"retain": 0, "select": 3}[kind]
    for key, rows in seen.items():
        made = 3 * key[4] + 3 - newest
        assert len(rows) == min(6 * made, most)
        if made:
            assert {(f, r, c) for f, r, c in rows if f >= made - 3} == {
                (float(f), float(r), float(c))
                for f in range(made - 3, made) for r in range(2) for c in range(3)
            }  # fmt: skip
        sets.setdefault(key[4], set()).add(frozenset(rows))
    assert {len(own) for own in sets.values()} == {1}


@pytest.mark.slow
def test_single_rows_are_held_equally_often():
    """80 samples of 24 rows of the past: each within four deviations of its share; none alike."""
    tape = random_tape(
        chunked([1] * 6, noisy=0), layers=1, heads=1, head_dim=6, grid=(2, 3), batch=80
    )
    session = tape.session(control("retain", "token", "14t"))
    tape.play(session)
    held = [spots(cache.stores["cond"][0].table)[0] for cache in session.samples]
    counts = Counter(row for own in held for row in own if row[0] < 5)
    share = 8 / 30
    spread = math.sqrt(80 * share * (1 - share))
    assert all(len(own) == 14 for own in held)
    for frame in range(5):
        for place in range(6):
            count = counts[float(frame), float(place // 3), float(place % 3)]
            assert abs(count - 80 * share) <= 4 * spread
    assert len(set(map(frozenset, held))) == 80
