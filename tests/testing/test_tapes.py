"""Recorded tapes: passes as samplers make them, played again and again to the same end."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from parts import policy

from lightning_kv import preset
from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.models.samplers import ChunkPlan, few_step
from lightning_kv.policies.base import RetainPart, SelectPart
from lightning_kv.testing import (
    chunked,
    guided,
    random_tape,
    recorded_tape,
    rolling,
    without_commits,
)

PROMPT = "dusk fast n10 left"


def test_importing_the_package_loads_neither_its_modules_nor_pytest():
    """Pytest loads its plug-in in every run, so it must be light."""
    code = """
import sys
import lightning_kv.testing as testing
assert not [name for name in sys.modules if name.startswith("lightning_kv.testing.")]
testing.random_tape, testing.Script, testing.obey
assert "pytest" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_passes_are_those_of_the_sampler():
    plan = ChunkPlan(10, 3, short_last=True)
    steps, found = few_step(plan, (1000.0, 500.0), lambda *_: torch.zeros(1), None), []
    step, _ = next(steps)
    while step is not None:
        found.append(step)
        try:
            step, _ = steps.send(torch.zeros(1))
        except StopIteration:
            step = None
    assert chunked((3, 3, 3, 1)) == found


def test_passes_of_several_chunks_in_flight():
    steps = rolling(2, 7, 3)
    assert [s.frames for s in steps if s.phase == "commit"] == [(0, 1), (2, 3), (4, 5), (6,)]
    assert max(len(s.frames) for s in steps) == 6
    merged = without_commits(steps)
    assert [s.final for s in merged if s.final] == [(0, 1), (2, 3), (4, 5), (6,)]
    assert {s.phase for s in merged} == {"denoise"}
    assert [s.namespace for s in guided(merged)[:2]] == ["cond", "uncond"]


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3, 3, 2), (4,), (1, 1, 1)])
def test_a_tape_has_the_geometry_that_was_asked_for(sizes):
    tape = random_tape(chunked(sizes), layers=3, heads=2, head_dim=18, grid=(3, 2), batch=2)
    assert tape.geometry.chunk == max(sizes) and tape.frames == sum(sizes)
    for entry in tape.entries:
        assert len(entry.layers) == 3
        for x in (x for qkv in entry.layers for x in qkv):
            assert x.shape == (2, 6 * len(entry.step.frames), 2, 18)


def test_playing_changes_no_tape_and_ends_alike():
    tape = random_tape(chunked((2,) * 6), batch=2)
    before = tape.copy()
    first, again = (tape.play(preset("h2o@4f")) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for a, b in zip(before.entries, tape.entries, strict=True):
        assert all(torch.equal(x, y) for p, q in zip(a.layers, b.layers, strict=True)
                   for x, y in zip(p, q, strict=True))  # fmt: skip
    other = random_tape(chunked((2,) * 6), batch=2, seed=1)
    assert not torch.equal(other.play(preset("h2o@4f"))[0], first[0])


def test_a_sample_alone_keeps_its_seed_and_key():
    tape = random_tape(chunked((2,) * 6), batch=2)
    together, alone = tape.play(preset("random@4f")), tape.alone(1).play(preset("random@4f"))
    assert tape.alone(1).seeds == tape.seeds[1:] and tape.alone(1).keys == ("prompt 1",)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


@dataclass(frozen=True)
class Told(SelectPart):
    """Notes what it is told."""

    seen: Any = field(default_factory=list, compare=False)

    def event(self, event, views, state):
        self.seen.append((event.kind, event.frame))

    def on_prediction(self, step, timestep, x0, state):
        self.seen.append(("prediction", timestep, x0.shape[0]))

    def on_final(self, x0, state):
        self.seen.append(("final", x0.shape[0]))


@dataclass(frozen=True)
class Again(RetainPart):
    """Encodes the first chunk again at every commit."""

    def commit(self, views, state):
        return Rebuild((0, 1)) if views[0].step.chunk else None


def test_parts_are_told_what_a_rollout_tells_them():
    told = Told()
    tape = random_tape(chunked((2, 2, 1), 1), events=(Event("scene_cut", 2),))
    tape.play(policy(select=told))
    assert told.seen == [
        ("start", 0),
        ("prediction", 1000.0, 2), ("final", 2),
        ("scene_cut", 2),
        ("prediction", 1000.0, 2), ("final", 2),
        ("prediction", 1000.0, 1), ("final", 1),
    ]  # fmt: skip


def test_frames_are_encoded_again_with_what_they_had():
    """So a rebuild of all that is held gives the rows that were there."""
    tape = random_tape(chunked((2, 2, 2), 1))
    session = tape.session(policy(retain=Again()))
    tape.play(session)
    plain = tape.session(policy())
    tape.cut(2).play(plain)
    for ours, theirs in zip(*(s.samples[0].stores["cond"] for s in (session, plain)), strict=True):
        assert ours.frames == (0, 1)
        assert torch.equal(ours.table.keys(), theirs.table.keys())


@pytest.mark.parametrize("name", ["full", "h2o@6f", "focused-forcing@6f"])
def test_a_recorded_rollout_is_played_as_it_was(panorama, name):
    """Same decisions, same bytes; another policy may be given the same tape."""
    tape, found = recorded_tape(panorama, preset(name), PROMPT, 15)
    session = tape.session(preset(name))
    tape.play(session)
    assert session.costs == found.costs
    for ours, theirs in zip(
        *(s.samples[0].stores["cond"] for s in (session, found.session)), strict=True
    ):
        assert torch.equal(ours.table.keys(), theirs.table.keys())
    other = tape.session(preset("sliding-window@6f"))
    assert len(tape.play(other)) == 6 * 5 * 5
    assert other.samples[0].stores["cond"][0].frames == tuple(range(9, 15))


def test_a_recorded_rollout_has_its_events(panorama):
    event = Event("prompt_switch", 9, "noon fast n13 left")
    tape, found = recorded_tape(panorama, preset("longlive@6f"), PROMPT, 15, events=(event,))
    assert found.rebuilds > 0
    assert [e.step.start for e in tape.entries if e.events == (event,)] == [9]
    assert not any(step.rebuild for step in tape.steps), "a tape makes its own"
    session = tape.session(preset("longlive@6f"))
    tape.play(session)
    stores = session.samples[0].stores["cond"]
    assert [s.frames for s in stores] == [s.frames for s in found.session.samples[0].stores["cond"]]
