"""Rules that hold for every cache policy, as functions.

A rule takes a candidate and the name of a tape, and raises where it is broken. What is written down
here is what :mod:`lightning_kv.testing.conformance` tries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_kv.cache.checks import asking
from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.cache.sample import SampleCache
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.budgets import Amount, part_of
from lightning_kv.testing.candidate import (
    FULL,
    Candidate,
    admitted,
    allowed_rows,
    generous,
    play,
    starts_late,
    tape,
    within,
)
from lightning_kv.testing.reach import (
    bytes_of,
    footprint,
    held_tensors,
    state_tensors,
    unchanged,
)
from lightning_kv.testing.tapes import show
from lightning_kv.testing.waits import waiting

Rule = Callable[[Candidate, str], None]
GEOMETRIES = (
    "chunks of 3", "chunks of 1", "chunks of 4", "short last chunk", "shorter first chunk",
    "given frames", "rolling", "rolling, short last chunk", "no commit pass",
    "rolling, no commit pass",
)  # fmt: skip
"""Tapes of other chunks, grids and samplers."""
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Entry:
    """A rule, the tapes it is tried on, and the policies that it is about."""

    rule: Rule
    tapes: tuple[str, ...]
    about: Callable[[CachePolicy], bool]


RULES: dict[str, Entry] = {}
"""By name."""


def on(*tapes: str, about: Callable[[CachePolicy], bool] = lambda policy: True) -> Any:
    """Register a rule for some tapes."""

    def register(rule: Rule) -> Rule:
        RULES[rule.__name__] = Entry(rule, tapes, about)
        return rule

    return register


def _budgeted(policy: CachePolicy) -> bool:
    return any(part.budget is not None for part in (policy.retain, policy.select))


def _bounded(policy: CachePolicy) -> bool:
    budget = policy.retain.budget
    return budget is not None and Amount.parse(budget.amount).unit != "share"


def _same(ours: Iterable[Tensor], theirs: Iterable[Tensor], what: str, **close: float) -> None:
    """All outputs are equal, or close where a tolerance is given."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not close:
            assert torch.equal(a, b), f"{what}: output {i} differs by {(a - b).abs().max():.3g}"
            continue
        torch.testing.assert_close(a, b, **close, msg=lambda t, i=i: f"{what}: output {i}: {t}")


# -- what is kept and read -------------------------------------------------------------------


@on(*GEOMETRIES, "guided", "events", "two samples", "recorded")
def runs_everywhere(candidate: Candidate, name: str) -> None:
    """A policy works for any chunk length, grid, number of layers and heads, and any sampler."""
    found, own = candidate.played(name), tape(name)
    shapes = [q.shape for entry in own.entries for q, _, _ in entry.layers]
    for out, shape in zip(found.outputs, shapes, strict=True):
        assert out.shape == shape and bool(out.isfinite().all()), "outputs are no numbers"


@on("chunks of 3", "chunks of 1", "rolling", about=_budgeted)
def a_budget_of_everything_loses_nothing(candidate: Candidate, name: str) -> None:
    """Where the budget exceeds the history, the output is that of the full cache, bit for bit."""
    own = tape(name)
    policy = admitted(generous(candidate.policy, own), own)
    for backend, close in (("reference", {}), ("sdpa", CLOSE)):
        _same(
            own.play(policy, backend=backend), full(name, backend), f"against full ({backend})",
            **close,
        )  # fmt: skip


@on(*GEOMETRIES, about=lambda policy: policy.retain.budget is not None)
def budgets_are_kept(candidate: Candidate, name: str) -> None:
    """After a commit no head holds more rows than its budget; heads that share one, on average.

    A part that is asked when a chunk opens, and not at the commit, holds the newest chunk until
    then: it is still the current one, which does not count.
    """
    found, made = candidate.played(name), 0
    late, tokens = "commit" not in found.session.policy.retain.moments, tape(name).geometry.tokens
    for step in (step for step in tape(name).steps if step.final):
        made = step.final[-1] + 1
        allowed = allowed_rows(found.session, "retain", made)
        held = {k: rows for k, rows in found.decisions.held.items() if k[4] == step.chunk}
        if late:
            held = {key: rows - len(step.final) * tokens for key, rows in held.items()}
        if allowed is not None and isinstance(allowed[0], float):
            most = sum(allowed) / len(allowed) * len(held)
            assert sum(held.values()) <= most + 1e-6, f"holds {held}"
        elif allowed is not None:
            for key, rows in held.items():
                most = allowed[key[2]][key[3]]
                assert rows <= most + 1e-6, f"{key}: {rows} rows held, {most} allowed"


@on(*GEOMETRIES, about=lambda policy: policy.select.budget is not None)
def reads_keep_to_their_budget(candidate: Candidate, name: str) -> None:
    """No query frame reads more history than its budget; heads that share one, on average.

    Where a selection has a ``start``, everything may be read until then. What is read of the frames
    in flight beyond the own chunk counts where a part chooses among them.
    """
    found, own = candidate.played(name), tape(name)
    if (allowed := allowed_rows(found.session, "select", own.frames)) is None:
        return
    last, chunk = own.steps[-1].chunk, own.geometry.chunk * own.geometry.tokens
    last, begun = None if starts_late(found.session.policy.select) else last, set()
    together: dict[tuple[Any, ...], list[int]] = {}
    for key, (rows, held) in found.decisions.count.items():
        if isinstance(allowed[0], float):
            together.setdefault(key[:3] + key[4:], []).append(rows)
            continue
        most, phase = allowed[key[2]][key[3]], key[2:4] + key[5:6]
        if rows < held:
            begun.add(phase)
        started = phase in begun or key[4] == last
        fits = rows <= most or rows + found.decisions.current[key][1] <= most + chunk
        assert fits or not started, f"{key}: {rows} rows read, {most} allowed"
    for key, rows in together.items():
        if key[3] == last:
            assert sum(rows) <= allowed[key[2]] * len(rows) + 1e-6, f"{key}: {rows} rows read"


@on(*GEOMETRIES)
def protected_rows_stay(candidate: Candidate, name: str) -> None:
    """Memory holds all rows of a sink, and of the newest chunk where a part protects it."""
    found, own = candidate.played(name), tape(name)
    part, tokens = found.session.policy.retain, own.geometry.tokens
    sink, newest = getattr(part, "sink", 0), hasattr(part, "granularity")
    if not isinstance(sink, int):
        budget = Amount.parse(part.budget.amount)
        sink = part_of(sink, budget.value) if budget.unit == "f" else 0
    for key, rows in found.decisions.kept.items():
        (step,) = (s for s in own.steps if s.final and s.chunk == key[4] and s.namespace == key[0])
        wanted = {f for f in range(sink) if f <= step.final[-1]}
        wanted |= set(step.final) if newest else set()
        for frame in wanted:
            there = sum(row[0] == frame for row in rows)
            assert there == tokens, f"{key}: {there} of {tokens} rows of frame {frame} are held"


@on(*GEOMETRIES)
def the_chunk_in_flight_is_read(candidate: Candidate, name: str) -> None:
    """Every query frame reads rows of its own frame."""
    for key, (itself, _) in candidate.played(name).decisions.current.items():
        assert itself, f"{key} reads nothing of its own frame"


@on("events")
def no_stale_rows_after_events(candidate: Candidate, name: str) -> None:
    """A prompt switch or a scene cut leaves no rows of frames to come, and the rollout goes on."""
    own = tape(name)
    session = own.session(candidate.fitted(name))
    for step, outputs in own.running(session):
        end = step.final[-1] + 1 if step.final else step.start
        for store in session.samples[0].stores[CONDITIONAL]:
            table = store.table
            late = (table.frame_id >= end) & table.valid
            assert not late.any(), f"rows of frames from {end} on in pass {step}"
            assert not store.frames or store.frames[-1] < end
        assert all(bool(out.isfinite().all()) for out in outputs)


# -- nobody disturbs anybody -----------------------------------------------------------------


@on("chunks of 3", "rolling", "guided")
def noisy_passes_leave_memory_alone(candidate: Candidate, name: str) -> None:
    """Committed rows change in retentions and at events, and at no other time."""
    own = tape(name)
    policy = candidate.fitted(name)
    session, before = own.session(policy), {}
    for step, _ in own.running(session):
        after = held_tensors(session, step.namespace)
        opened = step.opens and "open" in policy.retain.moments
        if not step.final and not opened and before.get(step.namespace):
            unchanged(before[step.namespace], after, f"a noisy pass of frames {step.frames}")
        before[step.namespace] = after


@on("chunks of 3", "events", "rolling")
def views_are_not_written(candidate: Candidate, name: str) -> None:
    """What a part is shown is the cache itself: it may look, and clone what it wants to change.

    The cache counts writes; here the numbers themselves are compared, whatever way was taken.
    """
    own = tape(name)
    given = [x.clone() for entry in own.entries for qkv in entry.layers for x in qkv]

    @contextmanager
    def guarded(cache: SampleCache, part: Any, view: CacheView) -> Iterator[None]:
        namespace = view.step.namespace
        before = held_tensors(cache.session, namespace)
        with asking(part, view, cache.stores[namespace]):
            yield
        unchanged(before, held_tensors(cache.session, namespace), f"the question to {part!r}")

    with patch.object(SampleCache, "_asking", guarded):
        own.play(candidate.fitted(name))
    now = [x for entry in own.entries for qkv in entry.layers for x in qkv]
    if changed := [i for i, (a, b) in enumerate(zip(given, now, strict=True)) if not a.equal(b)]:
        raise AssertionError(f"queries, keys or values of a pass were overwritten: {changed[:5]}")


@on("chunks of 3", "rolling", "no commit pass")
def scratch_passes_change_nothing(candidate: Candidate, name: str) -> None:
    """A pass that is thrown away leaves rows, states and all later outputs as they were."""
    own, outputs = tape(name), []
    alone, session = candidate.played(name), own.session(candidate.fitted(name))
    for (step, found), entry in zip(own.running(session), own.entries, strict=True):
        outputs += found
        if step.final:
            continue
        before = held_tensors(session), state_tensors(session)
        far = step.frames[-1] + 4, own.geometry.tokens  # no plan is in force for this frame
        for frames, rows in ((step.frames, None), (far[:1], far[1])):
            scratch = replace(step, frames=frames, mode="scratch", opens=False)
            scratch = replace(scratch, timesteps=(500.0,) * len(frames))
            layers = tuple(tuple(x[:, :rows] for x in qkv) for qkv in entry.layers[::-1])
            with torch.no_grad():
                own.through(session, scratch, layers)
                session.finish(scratch)
        for old, new in zip(before, (held_tensors(session), state_tensors(session)), strict=True):
            unchanged(old, new, f"a scratch pass of frames {step.frames}")
    _same(outputs, alone.outputs, "with scratch passes between")


@on("two samples")
def samples_are_strangers(candidate: Candidate, name: str) -> None:
    """A clip is decided as if it were alone, with the seed and key that it has in the batch."""
    own, together = tape(name), candidate.played(name)
    for sample in range(own.batch):
        alone = play(candidate.fitted(name), own.alone(sample))
        mine = [out[sample : sample + 1] for out in together.outputs]
        for kind in ("kept", "read"):
            every = getattr(together.decisions, kind)
            found = {key: rows for key, rows in every.items() if key[1] == sample}
            expected = getattr(alone.decisions, kind)
            wrong = [k for k, rows in found.items() if rows != expected[(k[0], 0, *k[2:])]]
            assert not wrong, f"sample {sample} of a batch has other rows {kind}: {wrong[:3]}"
        _same(mine, alone.outputs, f"sample {sample} alone", atol=1e-5, rtol=0)


@on("chunks of 3")
def the_same_seed_gives_the_same(candidate: Candidate, name: str) -> None:
    """Twice the same, bit for bit: every draw comes from the seed that a view shows."""
    twice = tape(name).play(candidate.fitted(name))
    _same(twice, candidate.played(name).outputs, "the second time")


@on("chunks of 3")
def parts_hold_no_state(candidate: Candidate, name: str) -> None:
    """What a part remembers lies in the state it is given: two rollouts at a time are strangers."""
    tapes, policy = (tape(name), tape("another seed")), candidate.fitted(name)
    before = [footprint(part) for part in policy.parts]
    apart = [own.play(policy) for own in tapes]
    every = [*policy.parts, *candidate.policy.parts]
    for part, old in zip(every, before + candidate.before, strict=True):
        assert old == footprint(part), f"{part!r} has changed, or its class or module"
    together: list[list[Tensor]] = [[], []]
    turns = zip_longest(*(own.running(own.session(policy)) for own in tapes))
    for each in turns:
        for outputs, found in zip(together, each, strict=True):
            outputs += found[1] if found else []
    for ours, theirs in zip(together, apart, strict=True):
        _same(ours, theirs, "two rollouts at a time")


# -- however it is run -----------------------------------------------------------------------


@on("chunks of 3", "rolling", "guided")
def buffers_agree(candidate: Candidate, name: str) -> None:
    """Copies that live as long as their plan, or are made anew in each pass: the same output."""
    kept = candidate.played(name, buffers="keep").outputs
    _same(kept, candidate.played(name).outputs, "kept buffers", atol=1e-6, rtol=0)


@on(*GEOMETRIES, "recorded")
def kernels_agree(candidate: Candidate, name: str) -> None:
    """The read plan gives what masks over all that is held give, up to rounding."""
    planned = candidate.played(name).outputs
    masked = tape(name).play(candidate.fitted(name), backend="reference")
    _same(planned, masked, "the plan", **CLOSE)


@on("guided")
def branches_decide_alike(candidate: Candidate, name: str) -> None:
    """Under guidance each branch decides, or the other one takes over what the prompt's decides."""
    policy = candidate.fitted(name)
    for branches in ("each", "shared"):
        found = candidate.played(name, replace(policy, branches=branches))
        assert set(found.session.samples[0].stores) == {CONDITIONAL, "uncond"}
    for kind in ("kept", "read"):
        every = getattr(found.decisions, kind)
        for key, rows in every.items():
            if key[0] == CONDITIONAL:
                assert every[("uncond", *key[1:])] == rows, f"the other branch of {key} {kind}"


@on("chunks of 3", "events", "guided")
def bytes_are_real(candidate: Candidate, name: str) -> None:
    """Held bytes are those of all storages that can be reached from memory and states."""
    session = candidate.played(name).session
    for cache in session.samples:
        held = bytes_of(cache._held())
        assert session.held_bytes(cache.index) == held, "some tensors are not counted"
        assert session.costs[cache.index].peak_bytes >= held


@on("long", about=_bounded)
def memory_is_bounded(candidate: Candidate, name: str) -> None:
    """A budget of rows bounds memory, states and archive, however long the video."""
    own = tape(name)
    session = own.session(admitted(within(candidate.policy, own, 8), own))
    states, frames = [], [1]
    for step, _ in own.running(session):
        if step.final:
            stores = session.samples[0].stores[CONDITIONAL]
            shelves = [store.archive for store in stores]
            states.append(bytes_of(session.samples[0].states, shelves))
            frames.append(sum(len(store.frames) for store in stores))
    frames.pop()  # what is remembered of a memory was found in the passes that read it
    ends = [(max(x[len(x) * 2 // 3 :]), max(x[: len(x) * 2 // 3])) for x in (states, frames)]
    (late, early), (more, some) = ends
    # what is remembered of each held frame may grow with their number, where heads hold others
    assert late <= early * max(1, more / some), f"bytes of states go on growing: {states}"
    held = session.costs[0].chunk_bytes
    third = len(held) * 2 // 3
    assert max(held[third:]) <= 1.1 * max(held[:third]), f"bytes go on growing: {held}"


@on("chunks of 3")
def plans_wait_for_nothing(candidate: Candidate, name: str) -> None:
    """The host waits for the device once per plan and layer, once at a commit, and else never."""
    own = tape(name)
    policy = candidate.fitted(name)
    session, of = own.session(policy), own.geometry
    each = policy.select.refresh == "pass"
    for entry in own.entries:
        step = entry.step
        moments = [m for m, now in (("open", step.opens), ("closing", step.final)) if now]
        asked = (step.opens or each) + sum(m in policy.retain.moments for m in moments)
        with torch.no_grad(), waiting() as found:
            own.through(session, step, entry.layers)
        assert len(found) <= asked * of.layers, f"{step.phase} pass {step.step}: {found}"
        with torch.no_grad(), waiting() as found:
            show(session, entry)
            session.finish(step)
        assert len(found) <= (1 + policy.precision.codes) * bool(step.final), f"commit: {found}"


def full(name: str, backend: str) -> list[Tensor]:
    """What the full cache gives."""
    if (name, backend) not in _FULL:
        _FULL[name, backend] = tape(name).play(FULL, backend=backend)
    return _FULL[name, backend]


_FULL: dict[tuple[str, str], list[Tensor]] = {}
