"""A policy under test: with budgets that fit a tape, and what came of playing each tape once."""

from __future__ import annotations

import math
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.base import CachePolicy, SelectPart
from lightning_kv.policies.budget.uniform import Uniform
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.curve_tables import CurveTable, Reading, shipped_curves
from lightning_kv.policies.part import Part
from lightning_kv.policies.registry import SLOTS
from lightning_kv.policies.scored import ScoredPart
from lightning_kv.policies.scorer.artifact import (
    Scorer,
    ScorerFile,
    check_model,
    shipped_scorers,
)
from lightning_kv.policies.scorer.students import make_student
from lightning_kv.policies.tables import HeadTable
from lightning_kv.testing.compare import Decisions
from lightning_kv.testing.reach import footprint
from lightning_kv.testing.schedules import chunked, guided, rolling, without_commits
from lightning_kv.testing.tapes import FULL, Tape, random_tape, recorded_tape


class Refused(Exception):
    """The policy declares a need that a model, sampler or rollout does not meet."""


def _recorded() -> Tape:
    """What the embedded model asks of its cache; of four denoising passes the first two."""
    from lightning_kv.models import load_model  # loads weights: only where it is asked for

    tape, _ = recorded_tape(load_model("panorama"), FULL, "dusk fast n10 left", 18)
    return replace(tape, entries=tuple(e for e in tape.entries if e.step.step < 2))


TAPES: dict[str, Callable[[], Tape]] = {
    "chunks of 3": lambda: random_tape(chunked((3,) * 8)),
    "chunks of 1": lambda: random_tape(chunked((1,) * 10, 1), grid=(1, 4)),
    "chunks of 4": lambda: random_tape(chunked((4,) * 6, 1), grid=(3, 2)),
    "short last chunk": lambda: random_tape(chunked((3, 3, 3, 3, 3, 1), 1), grid=(1, 5)),
    "shorter first chunk": lambda: random_tape(chunked((1, 3, 3, 3, 3, 3), 1)),
    "given frames": lambda: replace(random_tape(chunked((2,) * 8, 1, context=2)), context=4),
    "rolling": lambda: random_tape(rolling(2, 14, 3)),
    "rolling, short last chunk": lambda: random_tape(rolling(3, 13, 2), grid=(2, 2)),
    "no commit pass": lambda: random_tape(without_commits(chunked((3,) * 6))),
    "rolling, no commit pass": lambda: random_tape(without_commits(rolling(2, 12, 2))),
    "guided": lambda: random_tape(guided(chunked((3,) * 6, 1))),
    "events": lambda: random_tape(
        chunked((3,) * 8, 1),
        events=(Event("prompt_switch", 12, "another prompt"), Event("scene_cut", 18)),
    ),
    "two samples": lambda: random_tape(chunked((3,) * 6, 1), batch=2, seed=1),
    "another seed": lambda: random_tape(chunked((3,) * 8), seed=2),
    "long": lambda: random_tape(chunked((4,) * 15, 1), grid=(1, 2)),
    "recorded": _recorded,
}
"""By name; made when they are first asked for."""


def tape(name: str) -> Tape:
    """A tape of :data:`TAPES`; a copy, so that a part that writes into it spoils no other test."""
    return _made(name).copy()


@cache
def _made(name: str) -> Tape:
    return TAPES[name]()


@dataclass
class Played:
    """What came of one tape.

    Args:
        session: As it was left.
        outputs: Of all layers in all passes.
        decisions: What was kept and read.
    """

    session: CacheSession
    outputs: list[Tensor]
    decisions: Decisions


class Candidate:
    """A policy under test.

    Args:
        policy: As it was given; nobody has played anything with it yet.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.before = [footprint(part) for part in policy.parts]
        self._played: dict[tuple[Any, ...], Played | Exception] = {}

    def fitted(self, name: str) -> CachePolicy:
        """The policy with budgets that leave something out on this tape, if they do not yet.

        Raises:
            Refused: It cannot work there, and says so.
        """
        own = tape(name)
        return admitted(within(self.policy, own, (own.frames - own.geometry.chunk) // 2), own)

    def played(self, name: str, policy: CachePolicy | None = None, **settings: Any) -> Played:
        """Play a tape to its end, once for all checks."""
        key = (name, None if policy is None else repr(policy), tuple(sorted(settings.items())))
        if key not in self._played:
            try:
                self._played[key] = play(policy or self.fitted(name), tape(name), **settings)
            except (Refused, ValueError) as error:
                self._played[key] = error
        found = self._played[key]
        if isinstance(found, Exception):
            raise found
        return found


def play(policy: CachePolicy, own: Tape, **settings: Any) -> Played:
    """Play a tape, and note what is decided."""
    decisions = Decisions()
    session, outputs = own.session(policy, watch=decisions, **settings), []
    for step, found in own.running(session):
        outputs += found
        if step.final:
            decisions.commit(session, step)
    return Played(session, outputs, decisions)


def admitted(policy: CachePolicy, own: Tape) -> CachePolicy:
    """The policy, if it says that it works on a tape.

    Raises:
        Refused: It says that it does not, and what would work.
    """
    try:
        policy.check(own.geometry, own.geometry.chunk, own.frames)
        own.session(policy)
    except ValueError as error:
        clean = all(step.clean for step in own.steps if step.final)
        if clean:
            raise AssertionError(
                f"it refuses chunks of {own.geometry.chunk}, a grid of {own.geometry.grid} or "
                f"{own.frames} frames, and no policy may be made for one size: {error}"
            ) from error
        refusal(error)
    return policy


def refusal(error: ValueError) -> NoReturn:
    """Take an error for a refusal, if it also says what would work.

    Raises:
        Refused: It does.
        AssertionError: It does not.
    """
    parts = re.split(r"(?<=[.:?!])\s", str(error).strip())
    assert len(parts) > 1, f"refused without a way out: {error}"
    raise Refused(str(error)) from error


def within(policy: CachePolicy, own: Tape, most: int) -> CachePolicy:
    """Budgets of at most so many frames (reads: two thirds of it), and of what is protected.

    Head tables are of the tape's layers and heads.
    """
    policy, changed = headed(policy, own.geometry), {}
    for kind, limit in (("retain", most), ("select", most * 2 // 3)):
        part = getattr(policy, kind)
        if part.budget is None:
            continue
        amount, tokens = Amount.parse(part.budget.amount), own.geometry.tokens
        frames = {"f": amount.value, "t": amount.value / tokens}.get(amount.unit)
        if amount.unit == "share" or (frames is not None and frames <= limit):
            continue
        text = f"{max(limit, part.smallest(own.geometry.chunk))}f"
        try:
            changed[kind] = replace(part, budget=replace(part.budget, amount=text))
        except ValueError:  # a budget with a second amount: as it was given
            continue
    return replace(policy, asked=False, **changed)


def headed(policy: CachePolicy, of: Geometry) -> CachePolicy:
    """The policy with head tables of a model's layers and heads, drawn from what is in its own.

    Head curves start at what is protected there, and may be those that are shipped for any model;
    so may learned scorers be.
    """
    parts = {kind: _headed(getattr(policy, kind), of) for kind in SLOTS}
    return replace(policy, **parts)


def _headed(part: Part, of: Geometry, low: int = 1) -> Part:
    changed: dict[str, Any] = {}
    for name in (own.name for own in fields(part)):
        value = getattr(part, name)
        if isinstance(value, Part):
            least = part.smallest(of.chunk) if isinstance(part, ScoredPart) else low
            changed[name] = _headed(value, of, least)
        elif isinstance(value, HeadTable) and value.values:
            try:
                value.check_heads(of, name)
            except ValueError:
                count = of.layers * of.heads
                drawn = (value.values * count)[:count]
                drawn = random.Random(count).sample(drawn, count)
                rows = [drawn[at : at + of.heads] for at in range(0, count, of.heads)]
                changed[name] = HeadTable.of(rows)
        elif isinstance(value, CurveTable):
            changed[name] = _dealt(value, part.reading, of, low)
        elif isinstance(value, ScorerFile) and (other := _other_scorer(value, of)):
            changed[name] = other
    return replace(part, **changed) if changed else part


def _dealt(table: CurveTable, how: Reading, of: Geometry, low: int) -> CurveTable:
    """Head curves of a model's layers and heads, dealt in turn; as they are where they fit it.

    Args:
        table: Of any model.
        how: Which of a shipped file's curves are meant.
        of: The model.
        low: Frames that are protected there: the least budget.
    """
    shipped = shipped_curves()
    if table.file == "auto" and shipped and of.model not in shipped:
        table = CurveTable.read(next(iter(shipped.values())), "heads").chosen(how)
    try:
        if table.curve:
            table.check(of, transfer=False)
        if not table.curve or table.budgets[0] >= low:
            return table
    except ValueError:
        pass
    every = ([x for row in rows for x in row] for rows in (table.curve, table.importance))
    dealt = ([own[n % len(own)] for n in range(of.layers * of.heads)] for own in every)
    curve, importance = (
        tuple(tuple(own[at : at + of.heads]) for at in range(0, len(own), of.heads))
        for own in dealt
    )
    grid = tuple(range(low, low + len(table.budgets)))
    return CurveTable(grid, curve, importance, table.reading, file=table.file, sha256=table.sha256)


def _other_scorer(file: ScorerFile, of: Geometry) -> ScorerFile | None:
    """A scorer for a model of other sizes: what is known of layers and heads is dealt in turn.

    Args:
        file: Of any model.
        of: The model.

    Returns:
        None where it fits as it is.
    """
    shipped = shipped_scorers()
    if file.file == "auto" and shipped and of.model not in shipped:
        file = ScorerFile.read(next(iter(shipped.values())), "scorer")
    scorer = file.scorer(of)
    try:
        check_model(scorer, of, transfer=False)
        return None if file.file == "auto" else file
    except ValueError:
        return ScorerFile.read(_dealt_scorer(scorer, of.layers, of.heads), "scorer")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="scorers-")  # removed when the process ends


@cache
def _dealt_scorer(scorer: Scorer, layers: int, heads: int) -> Path:
    """A scorer with as many layers and heads, in a file."""
    student = make_student(**scorer.student.settings | {"layers": layers, "heads": heads})
    own, dealt = scorer.student.state_dict(), {}
    for name, blank in student.state_dict().items():
        rows = torch.arange(len(blank)) % len(own[name])
        dealt[name] = own[name][rows]
    student.load_state_dict(dealt)
    path = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.safetensors"
    replace(scorer, student=student, about={}).save(path)
    return path


def generous(policy: CachePolicy, own: Tape) -> CachePolicy:
    """The policy with budgets of everything; what has no budget, and what is no budget, left out.

    Parts without a budget, positions and codecs may well lose something: they do not say that
    they lose nothing.
    """
    policy, parts = headed(policy, own.geometry), {}
    for kind in ("retain", "select"):
        part, parts[kind] = getattr(policy, kind), getattr(FULL, kind)
        if part.budget is not None:
            most = max(own.frames, part.smallest(own.geometry.chunk))
            parts[kind] = replace(part, budget=Uniform(f"{most}f"))
    plain = {"positions": FULL.positions, "precision": FULL.precision}
    return replace(policy, asked=False, **parts, **plain)


def allowed_rows(
    session: CacheSession, kind: str, history: int
) -> list[list[float]] | list[float] | None:
    """Rows that a budget allows each head, layer by layer; or heads of each layer on average.

    Args:
        session: Of a policy.
        kind: ``retain`` or ``select``.
        history: Frames that have been made.
    """
    part, of = getattr(session.policy, kind), session.geometry
    if part.budget is None:
        return None
    amount = Amount.parse(part.budget.amount)
    if amount.unit == "B":
        return None
    share = max(math.floor(amount.value * history), part.smallest(of.chunk)) * of.tokens
    rows = {"f": amount.value * of.tokens, "t": amount.value, "share": share}[amount.unit]
    if part.budget.name == "uniform":
        return [[rows] * of.heads] * of.layers
    if amount.unit == "share":
        return None
    last = Pass("commit", (history,), (0.0,), 0, final=(history,))
    views = session.samples[0].views(last)
    given = [part.budget.allowed(view) for view in views]
    if None in given:
        return [part.budget.layer_mean(view) * of.tokens for view in views]
    return [[n * of.tokens for n in (own * of.heads)[: of.heads]] for own in given]


def starts_late(part: SelectPart) -> bool:
    """Whether a selection is told to read everything until some chunk, by a setting ``start``."""
    names = [x.name for x in fields(part) if x.name.rpartition("_")[2] == "start"]
    return any(getattr(part, name) not in ("budget", 0) for name in names)
