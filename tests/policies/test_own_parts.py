"""Parts of one's own: what a view gives them, and when they may be asked."""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import (
    STORAGE,
    AskAtCommit,
    Scattered,
    held,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    stores,
    tape,
    world,
)

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.base import SelectPart, UnitPart
from lightning_kv.policies.registry import build_budget
from lightning_kv.policies.retain.heavy_hitters import HeavyHitters

TOKENS, HEADS = sessions.GEOMETRY.tokens, sessions.GEOMETRY.heads


# -- scores by what keys are -----------------------------------------------------------------


def mean_keys(view):
    """The mean key of each frame before rotation, ``[H, F, D]``."""
    return view.by_frame(view.keys("raw").transpose(1, 2), "mean").transpose(1, 2)


@dataclass(frozen=True)
class LoudKeys(SelectPart):
    """Read the frames whose mean key is longest."""

    def scores(self, view, state):
        return mean_keys(view).norm(dim=-1).unsqueeze(1)


def test_mean_keys_by_frame_do_not_depend_on_how_keys_are_held():
    """Raw or rotated, whole or in part: those of slow loops, and 0 where a head has no row."""
    found = {}
    for name, positions in STORAGE.items():

        def question(views, name=name):
            for view in views:
                own = mean_keys(view)
                for h in range(view.heads):
                    rows = held(view, h)
                    for i, f in enumerate(view.frames):
                        mine = [r["raw"] for r in rows if r["frame_id"] == f]
                        expected = sum(mine) / len(mine) if mine else torch.zeros(12).double()
                        torch.testing.assert_close(own[h, i].double(), expected, atol=1e-5, rtol=0)
                found.setdefault(name, []).append(own)
            return Scattered().commit(views, {})

        made = policy(retain=AskAtCommit(question=question), positions=positions)
        play(session(made), tape(passes(5, noisy=1)))
    for a, b in zip(found["raw"], found["rotated"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("retain", ["everything", Scattered()])
def test_a_part_that_ranks_by_mean_keys_reads_the_same_either_way(retain):
    outputs = []
    for positions in STORAGE.values():
        part = LoudKeys(budget=build_budget("3f"))
        on = session(policy(retain=retain, select=part, positions=positions))
        outputs.append(play(on, tape(passes(5, noisy=1))))
        assert on.costs[0].rows_read > 0
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("how", ["sum", "mean", "max", "logsumexp"])
def test_reductions_over_the_rows_of_a_frame(how):
    """Of ragged heads, one line of values for each head or one for all."""
    plain = {
        "sum": sum,
        "mean": statistics.fmean,
        "max": max,
        "logsumexp": lambda x: float(torch.tensor(x).double().logsumexp(0)),
    }[how]
    seen = []

    def question(views):
        for view in views:
            heads = view.heads if view.layer else 1
            rng = torch.Generator().manual_seed(view.step.chunk)
            values = torch.randn(heads, 2, len(view), generator=rng)
            found = view.by_frame(values, how)
            for h in range(view.heads):
                rows = held(view, h)
                for i, f in enumerate(view.frames):
                    at = [n for n, r in enumerate(rows) if r["frame_id"] == f]
                    nothing = 0.0 if how in ("sum", "mean") else -torch.inf
                    for q in range(2):
                        own = values[h if heads > 1 else 0, q].tolist()
                        expected = plain([own[n] for n in at]) if at else nothing
                        line = found[h if len(found) > 1 else 0, q, i]
                        assert float(line) == pytest.approx(expected, abs=1e-5)
                    seen.append(len(at))
        return Scattered(share=0.4).commit(views, {})

    play(session(policy(retain=AskAtCommit(question=question))), tape(passes(4, noisy=1)))
    assert 0 in seen and len(set(seen)) > 2


# -- when a retention may be asked -----------------------------------------------------------


@dataclass(frozen=True)
class Hashed(UnitPart):
    """Single rows by a hash, asked at the opening of a chunk."""

    moments: ClassVar[tuple[str, ...]] = ("open",)

    def scores(self, view, state):
        """Other ones in every head."""
        head = torch.arange(view.heads).view(-1, 1)
        rows = (view.frame_id * 7 + view.raster * 5 + head * 3) % 11
        rows = rows.float().unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows


@dataclass(frozen=True)
class HashedAtEvents(Hashed):
    """The same at commits and at events."""

    moments: ClassVar[tuple[str, ...]] = ("commit",)

    def event(self, event, views, state):
        """The best of them stay."""
        if event.kind != "start":
            smaller = replace(self, budget=build_budget("16t"))
            return [smaller.keep(view, state) for view in views]


@dataclass(frozen=True)
class HeavyAtOpen(HeavyHitters):
    """Heavy hitters that are asked at the opening of a chunk."""

    moments: ClassVar[tuple[str, ...]] = ("open",)


@dataclass(frozen=True)
class HeavyAtClosing(HeavyHitters):
    """Heavy hitters that are asked in the commit pass."""

    moments: ClassVar[tuple[str, ...]] = ("closing",)


@dataclass(frozen=True)
class HeavyAtEvents(HeavyHitters):
    """Heavy hitters that are asked at commits and at events."""

    def event(self, event, views, state):
        """The best of them stay."""
        if event.kind != "start":
            smaller = replace(self, budget=build_budget("16t"))
            return [smaller.keep(view, state) for view in views]


@pytest.mark.parametrize("granularity", ["token", "frame"])
@pytest.mark.parametrize("cls", [Hashed, HeavyAtOpen, HeavyAtClosing])
@pytest.mark.parametrize("several", [False, True], ids=["one chunk", "several in flight"])
def test_rows_may_be_chosen_in_the_middle_of_a_pass(cls, granularity, several, monkeypatch):
    """The budget holds while a chunk is denoised; the sink and the newest chunk stay."""
    world(monkeypatch, known=True)
    part = cls(build_budget("16t"), granularity, 1)
    on, checked = session(policy(retain=part)), []

    def check(step):
        if step.chunk < 3 or (cls is HeavyAtClosing and not step.final):
            return
        for store in stores(on):
            assert set(store.memory.lengths) == {16}
            newest = {step.start - 2, step.start - 1} if "open" in cls.moments else set()
            assert {0, *newest} <= set(store.frames)
        checked.append(step.chunk)

    play(on, tape(rolling(5, 2) if several else passes(5)), check=check)
    assert checked


@pytest.mark.parametrize("granularity", ["token", "frame"])
@pytest.mark.parametrize("cls", [HashedAtEvents, HeavyAtEvents])
@pytest.mark.parametrize("kind", ["prompt_switch", "scene_cut"])
def test_rows_may_be_chosen_at_events(cls, granularity, kind):
    part, happened = cls(build_budget("24t"), granularity, 1), []

    def event(on, step):
        if step.chunk in (3, 5):
            assert {n for store in stores(on) for n in store.memory.lengths} == {24}
            on.event(Event(kind, step.start, "other"), step)
            happened.append(step.chunk)
            assert {n for store in stores(on) for n in store.memory.lengths} == {16}
            assert {0, step.start - 2, step.start - 1} <= set(stores(on)[0].frames)

    play(session(policy(retain=part)), tape(passes(6)), event=event)
    assert happened == [3, 5]
