"""A session against its slow twin: outputs, held rows, and decision by decision."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.cache.table import Table
from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import CachePolicy
from lightning_kv.testing.tapes import Tape
from lightning_kv.testing.twin import Row, Script, Stream, Twin, spot

Spots = set[tuple[float, ...]]
"""Rows by frame, row and column."""


class Agreement(NamedTuple):
    """How many decisions are the same, of how many."""

    equal: int
    total: int


def assert_same_as_twin(
    policy: CachePolicy,
    script: Script,
    tape: Tape,
    *,
    atol: float = 2e-5,
    rows_atol: float = 1e-4,
    **settings: Any,
) -> tuple[CacheSession, Twin]:
    """Play a tape into a session and into its twin: outputs and held rows must agree.

    Args:
        policy: What decides in the session.
        script: The same in plain Python, for the twin.
        tape: What is played; a small one, since the twin is slow.
        atol: Tolerance of the outputs.
        rows_atol: Tolerance of held keys, values and columns.
        settings: Of the session, such as ``backend`` and ``buffers``.

    Returns:
        Both, for a closer look.

    Raises:
        AssertionError: Says in which pass and layer they differ first, or in which stream.
    """
    session = tape.session(policy, **settings)
    twin = Twin(tape.geometry, tape.batch, script)
    pairs = zip(tape.running(session), tape.running(twin), strict=True)
    for (step, ours), (_, theirs) in pairs:
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            where = f"{step.phase} pass of frames {step.frames}, layer {layer}"
            torch.testing.assert_close(
                a.double(), b, atol=atol, rtol=0, msg=lambda text, at=where: f"{at}: {text}"
            )
    assert_same_rows(session, twin, rows_atol)
    return session, twin


def assert_same_rows(session: CacheSession, twin: Twin, atol: float = 1e-4) -> None:
    """Memory and archive of a session hold the rows of its twin, in the same order."""
    for namespace, branch in twin.branches.items():
        for (sample, layer, head), stream in branch.items():
            store = session.samples[sample].stores[namespace][layer]
            where = f"{namespace}, sample {sample}, layer {layer}, head {head}"
            for table, rows in ((store.table, stream.rows), (store.shelf, stream.archive)):
                _assert_rows(
                    held_rows(table, head, tuple(store.columns)), rows, stream, atol, where
                )
            together = [s for key, s in branch.items() if key[:2] == (sample, layer)]
            ids = {row.frame for own in together for row in own.rows}
            assert store.frames == tuple(sorted(ids)), f"{where}: frames that the host knows"


def _assert_rows(
    mine: list[Row], theirs: list[Row], stream: Stream, atol: float, where: str
) -> None:
    names = [(x.frame, *spot(stream.geometry, x.place)) for x in theirs]
    assert len(mine) == len(theirs), f"{where}: {len(mine)} rows held, {len(theirs)} in the twin"
    for a, b, name in zip(mine, theirs, names, strict=True):
        where_row = f"{where}, row {name}"
        assert a.frame == b.frame, f"{where_row}: frame {a.frame}"
        numbers = {"time": (a.time, b.time), "weight": (a.weight, b.weight)}
        numbers |= dict(zip(("row", "column"), zip(a.place, name[1:], strict=True), strict=True))
        for what, (x, y) in numbers.items():
            assert abs(x - y) <= 1e-5 * max(1, abs(y)), f"{where_row}: {what} {x}, not {y}"
        for what, x in a.columns.items():
            assert abs(x - b.columns[what]) <= atol, f"{where_row}: {what} {x}"
        for what in ("k", "v"):
            x, y = getattr(a, what), getattr(b, what)
            torch.testing.assert_close(
                x.double(), y.double(), atol=atol, rtol=0,
                msg=lambda text, at=f"{where_row}, {what}": f"{at}: {text}",
            )  # fmt: skip


def held_rows(table: Table, head: int, columns: Sequence[str] = ()) -> list[Row]:
    """Rows of one head of a table as the twin has them, keys before rotation."""
    count = table.lengths[head]
    names = ("frame_id", "time", "weight", *columns)
    own = {name: _line(table.field(name), head)[:count].tolist() for name in names}
    places = _line(table.place, head)[:count].tolist()
    keys, values = table.keys("raw")[head, :count], table.values()[head, :count]
    return [
        Row(
            own["frame_id"][i],
            own["time"][i],
            tuple(places[i]),
            keys[i],
            values[i],
            own["weight"][i],
            {name: own[name][i] for name in columns},
        )
        for i in range(count)
    ]


def _line(values: Tensor, head: int) -> Tensor:
    """One head's line of values ``[1 or H, ...]``."""
    return values[head if len(values) > 1 else 0]


# -- decision by decision --------------------------------------------------------------------


def compare_decisions(
    policy: CachePolicy,
    script: Script,
    tape: Tape,
    kinds: Sequence[str] | None = None,
    **settings: Any,
) -> Agreement:
    """Count the decisions in which a session and its twin agree.

    A decision is what one stream (namespace, sample, layer, head) keeps at a commit, or what one
    query frame of it reads of memory in a pass: a set of rows, named by frame and place. Decisions
    after the first wrong one may differ because memory does.

    Args:
        policy: What decides in the session.
        script: The same in plain Python, for the twin.
        tape: What is played.
        kinds: ``kept`` and ``read``; those that the policy leaves to no part ``everything``, where
            not given.
        settings: Of the session.

    Returns:
        How many are equal, and how many there are.
    """
    if kinds is None:
        own = {"kept": policy.retain, "read": policy.select}
        kinds = [kind for kind, part in own.items() if part.name != "everything"]
    ours = Decisions()
    session = tape.session(policy, watch=ours, **settings)
    twin = Twin(tape.geometry, tape.batch, script)
    twin.seen = {}
    kept: dict[tuple[Any, ...], Spots] = {}
    for (step, _), _ in zip(tape.running(session), tape.running(twin), strict=True):
        if step.final:
            ours.commit(session, step)
            for key, stream in twin.branch(step.namespace).items():
                kept[(step.namespace, *key, step.chunk)] = {
                    (r.frame, *map(float, spot(tape.geometry, r.place))) for r in stream.rows
                }
    theirs, equal, total = {"kept": kept, "read": twin.seen}, 0, 0
    for kind in kinds:
        mine = getattr(ours, kind)
        total += len(mine)
        equal += sum(found == theirs[kind].get(key, set()) for key, found in mine.items())
    return Agreement(equal, total)


class Decisions:
    """What every stream keeps and reads; watches a session, and is told of its commits.

    Keys are namespace, sample, layer, head and chunk; of what is read also pass and query frame.
    ``kept`` are sets of rows, ``held`` their number. ``count`` says how many rows of memory a query
    frame reads, and how many there are; ``current`` how many of its own frame, and of all that are
    in flight.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], Spots] = {}
        self.held: dict[tuple[Any, ...], int] = {}
        self.count: dict[tuple[Any, ...], tuple[int, int]] = {}
        self.current: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._lines: dict[tuple[Any, ...], tuple[list[tuple[float, ...]], list[bool]]] = {}

    @property
    def read(self) -> dict[tuple[Any, ...], Spots]:
        """The rows of memory that each query frame reads."""
        return {key: set(compress(*line)) for key, line in self._lines.items()}

    def __call__(self, view: PassView) -> None:
        """Note what one layer reads in one pass."""
        step, rows = view.step, spots(view)
        if step.rebuild:
            return
        shape = (view.heads, view.query_frames, -1)
        held, own = view.read
        held = view.valid.unsqueeze(1) if held is None else held
        own = held.new_ones(1, 1, view.flight) if own is None else own
        held, own = held.expand(*shape).tolist(), own.expand(*shape).tolist()
        tokens = view.geometry.tokens
        for head, mine in enumerate(rows):
            for query, frame in enumerate(step.frames):
                key = (step.namespace, view.sample, view.layer, head)
                key = (*key, step.chunk, step.phase, step.step, step.start, frame)
                line = held[head][query][: len(mine)]
                self._lines[key] = mine, line
                self.count[key] = sum(line), len(mine)
                itself = own[head][query][query * tokens : (query + 1) * tokens]
                self.current[key] = sum(itself), sum(own[head][query])

    def commit(self, session: CacheSession, step: Pass) -> None:
        """Note what memory holds after a pass that has made frames final."""
        for cache in session.samples:
            for layer, store in enumerate(cache.stores[step.namespace]):
                for head, rows in enumerate(spots(store.table)):
                    key = (step.namespace, cache.index, layer, head, step.chunk)
                    self.kept[key], self.held[key] = set(rows), len(rows)


def spots(table: Table) -> list[list[tuple[float, ...]]]:
    """Frame, row and column of every row, head by head."""
    every = torch.cat([table.frame_id.double().unsqueeze(-1), table.place.double()], -1)
    lines = [[tuple(x) for x in own] for own in every.tolist()]
    lines = lines if len(lines) > 1 else lines * table.heads
    return [own[:n] for own, n in zip(lines, table.lengths, strict=True)]
