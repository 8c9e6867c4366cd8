"""What parts may answer, against the slow twin; and what is refused."""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rules import PLACES, RAGGED, TOKENS, ByParity, ParityScript, RaggedScript
from sessions import (
    CHUNK,
    GEOMETRY,
    STORAGE,
    assert_both_agree,
    assert_same_rows,
    drive,
    passes,
    policy,
    session_of,
    store_of,
    stream_of,
    turn,
)

from lightning_kv.cache.decisions import Event, Match, Recode, Retention, Selection, Sums
from lightning_kv.policies.base import PositionsPart, PrecisionPart, RetainPart, SelectPart
from lightning_kv.policies.registry import build_part
from lightning_kv.testing import Row, Script
from lightning_kv.testing.twin import spot

HEADS = torch.arange(GEOMETRY.heads)

# -- positions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near(PositionsPart):
    """No row is further from a query frame than a lag that differs by head and query frame."""

    def lags(self, view, state, selection=None):
        lag = torch.tensor(view.step.query_times).view(1, -1, 1) - view.time.unsqueeze(1)
        odd = torch.tensor(view.step.frames).view(1, -1, 1) % 2
        return torch.minimum(lag, 1.5 + HEADS.view(-1, 1, 1) + odd)


class NearScript(Script):
    def time_for(self, stream, step, row, frame):
        time = step.query_times[step.frames.index(frame)]
        return time - min(time - row.time, 1.5 + stream.head + frame % 2)


class NearRagged(NearScript, RaggedScript):
    pass


class NearParity(NearScript, ParityScript):
    pass


class NearBoth(NearScript, ParityScript, RaggedScript):
    pass


@pytest.mark.parametrize(
    "settings",
    [{"backend": "sdpa"}, {"backend": "reference"}, {"buffers": "keep"}],
    ids=["sdpa", "reference", "kept buffers"],
)
@pytest.mark.parametrize(
    ("parts", "script"),
    [
        ({}, NearScript),
        ({"retain": RAGGED}, NearRagged),
        ({"select": ByParity()}, NearParity),
        ({"retain": RAGGED, "select": ByParity()}, NearBoth),
    ],
    ids=["all", "ragged", "chosen", "ragged and chosen"],
)
@pytest.mark.thinned(2)
def test_each_query_frame_meets_rows_at_other_times(parts, script, settings):
    made = policy(**parts, positions=Near())
    assert_same_rows(*assert_both_agree(made, script(), **settings))


# -- retentions in a pass --------------------------------------------------------------------


@dataclass(frozen=True)
class Late(RetainPart):
    """In the commit pass: the rows whose key agrees with the mean query."""

    moments: ClassVar[tuple[str, ...]] = ("closing",)

    def closing(self, view, state):
        assert view.step.final and len(view) == max(view.lengths)
        agrees = torch.einsum("hnd,hd->hn", view.keys("read"), view.query.mean(1)) > 0
        return Retention(keep=agrees & view.valid)


class LateScript(Script):
    def closing(self, stream, step, q):
        mean = sum(turn(x, step.query_times[i // TOKENS], i % TOKENS) for i, x in enumerate(q))
        stream.rows = [r for r in stream.rows if float(turn(r.k, r.time, r.place) @ mean) > 0]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("storage", STORAGE)
def test_the_commit_pass_reads_what_a_closing_retention_left(storage, backend):
    made = policy(Late(), positions=STORAGE[storage])
    session, twin = assert_both_agree(made, LateScript(), backend=backend)
    assert_same_rows(session, twin)
    assert len({len(stream.rows) for stream in twin.streams.values()}) > 1


def test_a_part_is_asked_at_the_moments_that_it_names():
    @dataclass(frozen=True)
    class Asked(RetainPart):
        moments: ClassVar[tuple[str, ...]] = ("open", "closing", "commit")

        def open(self, view, state):
            state.setdefault("asked", []).append((view.step.chunk, "open", view.layer))

        def closing(self, view, state):
            state["asked"].append((view.step.chunk, "closing", view.layer))

        def commit(self, views, state):
            state["asked"].append((views[0].step.chunk, "commit", len(views)))

    session = session_of(policy(Asked()))
    drive(session, passes(3), 1)
    expected = [
        (chunk, *x)
        for chunk in range(3)
        for x in (("open", 0), ("open", 1), ("closing", 0), ("closing", 1), ("commit", 2))
    ]
    assert session.samples[0].states["cond"]["retain"]["asked"] == expected


# -- matches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw(RetainPart):
    """Some old rows of every head, others in each, are drawn towards the newest chunk."""

    share: float = 0.5
    keys: bool = True
    values: bool = True
    twice: bool = False

    def commit(self, views, state):
        return [self.drawn(view) for view in views]

    def drawn(self, view):
        new = (view.frame_id >= view.step.start) & view.valid
        rows = ~new & view.valid & ((view.raster + HEADS.unsqueeze(1)) % 2 == 0)
        if view.step.chunk == 0:
            return None
        match = Match(rows, new, self.share, self.keys, self.values)
        back = (Match(new, ~new & view.valid, 0.25),) if self.twice else ()
        keep = (view.frame_id != view.step.chunk - 1) | (HEADS.unsqueeze(1) == 1)
        return Retention(match=(match, *back), keep=keep & view.valid)


class DrawScript(Script):
    def __init__(self, share, keys, values, twice):
        self.share, self.names, self.twice = share, "k" * keys + "v" * values, twice

    def commit(self, stream, step):
        if step.chunk == 0:
            return
        new = [r for r in stream.rows if r.frame >= step.start]
        old = [r for r in stream.rows if r.frame < step.start]
        self.draw([r for r in old if (r.place + stream.head) % 2 == 0], new, self.share, self.names)
        if self.twice:
            self.draw(new, old, 0.25, "kv")
        gone = step.chunk - 1
        stream.rows = [r for r in stream.rows if r.frame != gone or stream.head == 1]

    def draw(self, rows, like, share, names):
        for name in names:
            spots = []
            for own in (rows, like):
                lines = zip(*(getattr(r, name).tolist() for r in own), strict=True)
                both = [(statistics.fmean(x), statistics.pstdev(x)) for x in lines]
                spots.append([(mean, max(spread, 1e-6)) for mean, spread in both])
            for r in rows:
                moved = [
                    (1 - share) * x + share * (s2 * (x - m1) / s1 + m2)
                    for x, (m1, s1), (m2, s2) in zip(getattr(r, name).tolist(), *spots, strict=True)
                ]
                setattr(r, name, torch.tensor(moved, dtype=torch.float64))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("share", "keys", "values", "twice"),
    [
        (0.5, True, True, False),
        (1.0, True, False, False),
        (0.3, False, True, False),
        (0.5, True, True, True),
    ],
)
def test_rows_are_drawn_towards_others(storage, share, keys, values, twice):
    """Mean and deviation of every head and channel, of keys before rotation and of values."""
    how = {"share": share, "keys": keys, "values": values, "twice": twice}
    made = policy(Draw(**how), positions=STORAGE[storage])
    assert_same_rows(*assert_both_agree(made, DrawScript(**how), chunks=4))


# -- sums ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blend(RetainPart):
    """Rows from the archive and of memory, each in two new rows that lie between tokens."""

    align: str = "raw"
    weighted: bool = False

    def commit(self, views, state):
        return [self.blended(view) for view in views]

    def blended(self, view):
        if view.step.chunk == 1:  # the first head puts one frame aside, the others two
            old = view.frame_id < CHUNK
            return Retention(keep=~old, archive=old & ((view.frame_id == 0) | (HEADS[:, None] > 0)))
        if view.step.chunk != 3:
            return None
        assert view.archive.lengths == (TOKENS, 2 * TOKENS, 2 * TOKENS)
        place, size = torch.arange(TOKENS), len(view)
        source = torch.cat([size + place, size - TOKENS + place]).repeat(2).unsqueeze(0)
        target = torch.cat([place, place, TOKENS + place, TOKENS + place]).unsqueeze(0)
        share = torch.tensor([0.5, 0.25, -1.0, 2.0]).repeat_interleave(TOKENS).unsqueeze(0)
        frames = torch.tensor([0, view.frames[-1]]).repeat_interleave(TOKENS).unsqueeze(0)
        sums = Sums(
            source,
            target,
            share,
            frames,
            time=view.step.start - 0.5 - 0.25 * HEADS.unsqueeze(1).expand(-1, 2 * TOKENS),
            place=PLACES.repeat(1, 2, 1) + torch.tensor([0.25, 0.5]),
            weight=torch.full((1, 2 * TOKENS), 3.0) if self.weighted else None,
            align=self.align,
        )
        return Retention(sums=sums, discard=view.archive.frame_id == 1)


class BlendScript(Script):
    def __init__(self, align, weighted):
        self.align, self.weighted = align, weighted

    def commit(self, stream, step):
        if step.chunk == 1:
            last = 0 if stream.head == 0 else 1
            stream.archive = [r for r in stream.rows if r.frame <= last]
            stream.rows = [r for r in stream.rows if r.frame >= CHUNK]
        if step.chunk == 3:
            made = []
            for frame, shares in ((0, (0.5, 0.25)), (2 * CHUNK + 3, (-1.0, 2.0))):
                for p in range(TOKENS):
                    pair = stream.archive[p], stream.rows[len(stream.rows) - TOKENS + p]
                    made.append(self.blend(pair, shares, frame, p, stream, step))
            stream.rows += made
            stream.archive = [r for r in stream.archive if r.frame != 1]

    def blend(self, pair, shares, frame, place, stream, step):
        time = step.start - 0.5 - 0.25 * stream.head
        row, column = spot(stream.geometry, place)
        where = row + 0.25, column + 0.5
        parts = list(zip(shares, pair, strict=True))
        if self.align == "raw":
            k = sum(s * r.k.double() for s, r in parts)
        else:
            k = sum(s * turn(r.k, r.time, r.place) for s, r in parts)
            k = turn(k, time, where, sign=-1)
        v = sum(s * r.v.double() for s, r in parts)
        weight = 3.0 if self.weighted else sum(r.weight for r in pair)
        return Row(frame, time, where, k, v, weight)

    def bias(self, stream, step, frame, index, row):
        return torch.tensor(row.weight).log().item()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("align", ["raw", "relative"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.thinned(3)
def test_sums_read_memory_and_archive(storage, align, weighted):
    """One source feeds two rows at places and times between tokens; then a frame is forgotten."""
    made = policy(
        Blend(align=align, weighted=weighted), positions=STORAGE[storage], bias="log_weight"
    )
    assert_same_rows(*assert_both_agree(made, BlendScript(align, weighted), chunks=6))


@dataclass(frozen=True)
class Shift(RetainPart):
    """After chunk 2 old rows stand elsewhere, at other times in each head, and weigh more."""

    def commit(self, views, state):
        return [self.shifted(view) if view.step.chunk == 2 else None for view in views]

    def shifted(self, view):
        old = (view.frame_id < view.step.start).expand(view.heads, -1)
        moved = view.place + torch.tensor([0.25, -0.5])
        return Retention(
            time=torch.where(old, view.time / 2 - 0.25 * HEADS.unsqueeze(1), view.time),
            place=torch.where(old.unsqueeze(-1), moved, view.place),
            weight=torch.where(old[:1], 2.0, view.weight),
        )


class ShiftScript(Script):
    def commit(self, stream, step):
        if step.chunk != 2:
            return
        for r in stream.rows:
            if r.frame < step.start:
                row, column = spot(stream.geometry, r.place)
                r.time, r.weight = r.time / 2 - 0.25 * stream.head, 2.0
                r.place = row + 0.25, column - 0.5

    def bias(self, stream, step, frame, index, row):
        return torch.tensor(row.weight).log().item()


@pytest.mark.parametrize("storage", STORAGE)
def test_rows_get_other_times_places_and_weights(storage):
    made = policy(Shift(), positions=STORAGE[storage], bias="log_weight")
    assert_same_rows(*assert_both_agree(made, ShiftScript()))


# -- codecs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Two(PrecisionPart):
    """Two codecs at once, of frames in the other order than they lie."""

    def assign(self, view, state):
        if view.step.chunk != 1:
            return []
        return [
            Recode(codec, (view.frame_id == frame) & view.valid)
            for codec, frame in (("int8", 2), ("int4", 0))
        ]


@pytest.mark.parametrize("retain", ["everything", RAGGED], ids=["even", "ragged"])
def test_several_codecs_name_rows_of_the_table_that_was_shown(retain):
    plain, coded = (session_of(policy(retain, precision=p)) for p in ("as-computed", Two()))
    for session in (plain, coded):
        drive(session, passes(2), 1)
    for layer in range(GEOMETRY.layers):
        for head in range(GEOMETRY.heads):
            a, b = (stream_of(store_of(x, layer).memory, head) for x in (plain, coded))
            order = [
                torch.argsort(x["frame_id"] * TOKENS + x["place"] @ torch.tensor([2.0, 1.0]))
                for x in (a, b)
            ]
            for name in ("k", "v"):
                x, y = a[name][order[0]], b[name][order[1]]
                step = x.abs().amax(-1)
                error = (x - y).abs().amax(-1) / step
                frames = a["frame_id"][order[0]]
                assert not error[(frames == 1) | (frames == 3)].any()
                for frame, low, high in ((2, 1e-5, 1 / 254), (0, 1 / 100, 1 / 14)):
                    own = error[frames == frame]
                    assert ((own > low) & (own <= high + 1e-6)).all(), (layer, head, frame)


@dataclass(frozen=True)
class Some(PrecisionPart):
    """After chunk 1, rows that are not the oldest get a codec, so they come to lie first."""

    rule: Any = None

    def assign(self, view, state):
        if view.step.chunk != 1:
            return []
        return [Recode("int8", self.rule(view) & view.valid)]


SOME = {
    "a newer frame": lambda v: v.frame_id == 2,
    "every other row": lambda v: v.raster % 2 == 1,
    "other rows in each head": lambda v: (v.raster + HEADS.unsqueeze(1)) % 2 == 1,
    "another frame in each head": lambda v: v.frame_id == HEADS.unsqueeze(1),
}


@pytest.mark.parametrize("select", ["everything", ByParity()], ids=["all", "chosen"])
@pytest.mark.parametrize("name", SOME)
def test_rows_are_read_alike_wherever_a_codec_puts_them(name, select):
    """Up to the rounding of 8 bits; also where only whole frames are chosen."""
    plain, coded = (
        session_of(policy(select=select, precision=p))
        for p in ("as-computed", Some(rule=SOME[name]))
    )
    ours, theirs = (drive(session, passes(4), 1) for session in (plain, coded))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)
    assert not torch.equal(ours[-1], theirs[-1])


@pytest.mark.parametrize("name", SOME)
def test_rows_are_summed_over_their_frames_wherever_a_codec_puts_them(name):
    seen = []

    @dataclass(frozen=True)
    class Sums(SelectPart):
        def pick(self, view, state):
            if not len(view):
                return
            values = view.frame_id.unsqueeze(1).float().expand(view.heads, -1, -1)
            for how, times in (("sum", TOKENS), ("mean", 1), ("max", 1)):
                expected = times * view.frame_ids.float().expand(view.heads, 1, -1)
                assert torch.equal(view.by_frame(values, how), expected), how
            seen.append(view.frames)

    session = session_of(policy(select=Sums(), precision=Some(rule=SOME[name])))
    drive(session, passes(4), 1)
    assert len(seen) == 3 * GEOMETRY.layers, "once for each later chunk"


# -- refusals --------------------------------------------------------------------------------


def sums_of(view, **changes):
    """Sums that work, but for some fields."""
    row = torch.zeros(1, 2, dtype=torch.int64)
    fits = {
        "source": torch.tensor([[0, 1]]),
        "target": torch.tensor([[0, 1]]),
        "coefficient": torch.ones(1, 2),
        "frame_id": row + view.frames[0],
        "time": torch.zeros(1, 2),
        "place": torch.zeros(1, 2, 2),
    }
    return Retention(sums=Sums(**fits | changes))


RETENTIONS = {
    "keep of another length": lambda v: Retention(keep=torch.ones(1, 3).bool()),
    "keep for other heads": lambda v: Retention(keep=torch.ones(2, len(v)).bool()),
    "keep of numbers": lambda v: Retention(keep=torch.ones(1, len(v))),
    "keep of indices": lambda v: Retention(keep=torch.arange(len(v)).unsqueeze(0)),
    "keep without heads": lambda v: Retention(keep=torch.ones(len(v)).bool()),
    "archive of another length": lambda v: Retention(archive=torch.ones(1, 3).bool()),
    "discard of what is not there": lambda v: Retention(discard=torch.ones(1, 3).bool()),
    "time of another length": lambda v: Retention(time=torch.zeros(1, 3)),
    "place without columns": lambda v: Retention(place=torch.zeros(1, len(v))),
    "place of another length": lambda v: Retention(place=torch.zeros(1, 3, 2)),
    "weight of another length": lambda v: Retention(weight=torch.zeros(1, 3)),
    "a column of another length": lambda v: Retention(write={"mark": torch.zeros(1, 3)}),
    "a column nobody declares": lambda v: Retention(write={"lost": torch.zeros(1, len(v))}),
    "match of numbers": lambda v: Retention(match=(Match(torch.ones(1, len(v)), v.valid),)),
    "match like another length": lambda v: Retention(
        match=(Match(v.valid, torch.ones(1, 3).bool()),)
    ),
    "a source too high": lambda v: sums_of(v, source=torch.tensor([[0, len(v)]])),
    "a target too high": lambda v: sums_of(v, target=torch.tensor([[0, 2]])),
    "a target below 0": lambda v: sums_of(v, target=torch.tensor([[0, -1]])),
    "a frame that is not held": lambda v: sums_of(v, frame_id=torch.tensor([[0, 99]])),
    "a coefficient that is NaN": lambda v: sums_of(v, coefficient=torch.tensor([[1, torch.nan]])),
    "pairs of unequal number": lambda v: sums_of(v, source=torch.tensor([[0]])),
    "rows of unequal number": lambda v: sums_of(v, time=torch.zeros(1, 3)),
    "places without columns": lambda v: sums_of(v, place=torch.zeros(1, 2)),
    "a correction of another width": lambda v: sums_of(v, correction=torch.zeros(1, 2, 5)),
    "sources that are no integers": lambda v: sums_of(v, source=torch.zeros(1, 2)),
    "something else": lambda v: "everything",
}


@dataclass(frozen=True)
class Wrong(RetainPart):
    """Drops a frame in the first layer and answers something wrong in the second, at chunk 1."""

    columns: ClassVar[dict[str, str]] = {"mark": "keep"}
    moments: ClassVar[tuple[str, ...]] = ("commit",)
    answer: Any = None

    def commit(self, views, state):
        return [self.keep(view, state) for view in views]

    def keep(self, view, state):
        if view.step.chunk != 1:
            return None
        return self.answer(view) if view.layer == 1 else Retention(keep=view.frame_id != 0)


@dataclass(frozen=True)
class WrongAtOpen(Wrong):
    moments: ClassVar[tuple[str, ...]] = ("open",)


@dataclass(frozen=True)
class WrongAtClosing(Wrong):
    moments: ClassVar[tuple[str, ...]] = ("closing",)


def all_rows(session, layer):
    memory = store_of(session, layer).memory
    return [stream_of(memory, head) for head in range(GEOMETRY.heads)]


def unchanged(session, layer, frames):
    """Assert that a layer holds all rows of the first frames, as computed."""
    plain = session_of(policy())
    drive(plain, passes(2), 1)
    for a, b in zip(all_rows(session, layer), all_rows(plain, layer), strict=True):
        for name in ("frame_id", "time", "place", "weight", "k", "v"):
            assert torch.equal(a[name], b[name][: frames * TOKENS]), name


@pytest.mark.parametrize("name", RETENTIONS)
def test_retentions_that_cannot_be_are_refused(name):
    """With part, layer and chunk, before anything of any layer is changed."""
    session = session_of(policy(Wrong(answer=RETENTIONS[name])))
    with pytest.raises(ValueError, match=r"retain part 'Wrong' \(layer 1, chunk 1\)") as found:
        drive(session, passes(4), 1)
    for layer in range(GEOMETRY.layers):
        unchanged(session, layer, 4)
    text = str(found.value)
    assert any(word in text for word in ("Give", "Sources are", "Pairs", "Add", "NaN")), text


@pytest.mark.parametrize("part", [WrongAtOpen, WrongAtClosing])
@pytest.mark.parametrize("name", RETENTIONS)
def test_retentions_in_a_pass_that_cannot_be_are_refused(part, name):
    """Before the layer is changed."""
    session = session_of(policy(part(answer=RETENTIONS[name])))
    with pytest.raises(ValueError, match=rf"'{part.__name__}' \(layer 1, chunk 1\)"):
        drive(session, passes(4), 1)
    unchanged(session, 1, 2)


def test_decisions_for_other_layers_than_there_are_are_refused():
    @dataclass(frozen=True)
    class One(RetainPart):
        def commit(self, views, state):
            return [None]

    with pytest.raises(ValueError, match=r"'One' .* gave 1 decisions for 2 layers\. Give one"):
        drive(session_of(policy(One())), passes(1), 1)


def no_rows(view):
    rows = torch.zeros(view.heads, 1, len(view)).bool()
    return Selection(rows=rows, current=torch.zeros(1, 1, view.flight).bool())


SELECTIONS = {
    "frames of another number": lambda v: Selection(frames=torch.ones(1, 1, 5).bool()),
    "frames for other query frames": lambda v: Selection(
        frames=torch.ones(1, 3, len(v.frames)).bool()
    ),
    "frames of numbers": lambda v: Selection(frames=torch.ones(1, 1, len(v.frames))),
    "rows of another number": lambda v: Selection(rows=torch.ones(1, 1, 5).bool()),
    "rows with those in flight": lambda v: Selection(
        rows=torch.ones(1, 1, len(v) + v.flight).bool()
    ),
    "rows of numbers": lambda v: Selection(rows=torch.ones(1, 1, len(v))),
    "current of another number": lambda v: Selection(current=torch.ones(1, 1, 3).bool()),
    "bias without those in flight": lambda v: Selection(bias=torch.zeros(1, 1, len(v))),
    "bias of integers": lambda v: Selection(bias=torch.ones(1, 1, len(v) + v.flight).long()),
    "bias with NaN": lambda v: Selection(bias=torch.full((1, 1, len(v) + v.flight), torch.nan)),
    "nothing at all": no_rows,
    "something else": lambda v: v.valid,
}


@dataclass(frozen=True)
class WrongReads(SelectPart):
    """Answers something wrong in the second layer, at chunk 1."""

    answer: Any = None

    def pick(self, view, state):
        return self.answer(view) if view.step.chunk == 1 and view.layer == 1 else None


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_that_cannot_be_are_refused(name):
    """What only the device knows is raised when the chunk is committed, at the latest."""
    session = session_of(policy(select=WrongReads(answer=SELECTIONS[name])))
    with pytest.raises(ValueError, match=r"layer 1.* chunk 1") as found:
        drive(session, list(passes(4))[:6], 1)
    assert "'WrongReads' (layer 1, chunk 1)" in str(found.value)
    if name != "bias with NaN":
        unchanged(session, 1, 2)


LAGS = {
    "another number": lambda v: torch.zeros(1, 1, 5),
    "integers": lambda v: torch.zeros(1, 1, len(v)).long(),
    "no query axis": lambda v: torch.zeros(1, len(v)),
    "other query frames": lambda v: torch.zeros(1, 3, len(v)),
    "no tensor": lambda v: 3.0,
}


@pytest.mark.parametrize("name", LAGS)
def test_lags_that_cannot_be_are_refused(name):
    @dataclass(frozen=True)
    class WrongTimes(PositionsPart):
        def lags(self, view, state, selection=None):
            if view.layer == 1 and view.step.chunk == 1:
                return LAGS[name](view)
            return torch.zeros(1, 1, len(view))

    session = session_of(policy(positions=WrongTimes()))
    with pytest.raises(ValueError, match=r"'WrongTimes' \(layer 1, chunk 1\).*Give floats"):
        drive(session, passes(4), 1)
    assert store_of(session, 1).frames == (0, 1)


SCORES = {
    "NaN": lambda v, n: torch.full((1, 1, n), torch.nan),
    "a single NaN": lambda v, n: torch.where(torch.arange(n) == 1, torch.nan, 1.0).view(1, 1, -1),
    "integers": lambda v, n: torch.ones(1, 1, n).long(),
    "another number": lambda v, n: torch.ones(1, 1, n + 1),
    "no query axis": lambda v, n: torch.ones(1, n),
    "other heads": lambda v, n: torch.ones(2, 1, n),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("unit", ["frame", "token"])
@pytest.mark.parametrize("kind", [RetainPart, SelectPart], ids=["retain", "select"])
def test_scores_that_cannot_be_are_refused(kind, unit, name):
    wanted = unit

    @dataclass(frozen=True)
    class Scoring(kind):
        @property
        def unit(self):
            return wanted

        def scores(self, view, state):
            count = len(view.frames) if wanted == "frame" else len(view)
            if view.layer == 1:
                return SCORES[name](view, count)
            return torch.ones(1, 1, count)

    part = Scoring(budget=build_part("budget", {"part": "uniform", "amount": "1f"}))
    session = session_of(policy(**{kind.kind: part}))
    chunk = 0 if kind is RetainPart else 1
    with pytest.raises(ValueError, match=rf"'Scoring' \(layer 1, chunk {chunk}\) gave scores"):
        drive(session, passes(4), 1)
    if kind is RetainPart:
        for layer in range(GEOMETRY.layers):
            unchanged(session, layer, 2)


RECODES = {
    "rows of another number": lambda v: Recode("int8", torch.ones(1, 3).bool()),
    "rows of numbers": lambda v: Recode("int8", torch.ones(1, len(v))),
    "a codec that there is not": lambda v: Recode("int9", v.valid),
}


@pytest.mark.parametrize("name", RECODES)
def test_codecs_that_cannot_be_are_refused(name):
    @dataclass(frozen=True)
    class WrongCodes(PrecisionPart):
        def assign(self, view, state):
            return [RECODES[name](view) if view.layer == 1 else Recode("int8", view.valid)]

    session = session_of(policy(precision=WrongCodes()))
    with pytest.raises(ValueError, match=r"'WrongCodes' \(layer 1, chunk 0\)"):
        drive(session, passes(1), 1)
    unchanged(session, 0, 2)


# -- parts only look -------------------------------------------------------------------------

TENSORS = {
    "keys": lambda v: v.keys("read"),
    "values": lambda v: v.values(),
    "time": lambda v: v.time,
    "place": lambda v: v.place,
    "weight": lambda v: v.weight,
    "frame_id": lambda v: v.frame_id,
}


def writer(kind, tensor):
    """A part of a kind that writes into a tensor of its view, once there are rows."""

    def scrawl(view):
        if len(view) and view.layer == 1:
            TENSORS[tensor](view).zero_()

    @dataclass(frozen=True)
    class Commits(RetainPart):
        def commit(self, views, state):
            scrawl(views[1])

    @dataclass(frozen=True)
    class Opens(RetainPart):
        moments: ClassVar[tuple[str, ...]] = ("open",)

        def open(self, view, state):
            scrawl(view)

    @dataclass(frozen=True)
    class Hears(RetainPart):
        def event(self, event, views, state):
            scrawl(views[1])

    @dataclass(frozen=True)
    class Observes(RetainPart):
        observes: ClassVar[tuple[str, ...]] = ("denoise",)

        def observe(self, view, state):
            scrawl(view)

    @dataclass(frozen=True)
    class Picks(SelectPart):
        def pick(self, view, state):
            scrawl(view)

    @dataclass(frozen=True)
    class Assigns(PrecisionPart):
        def assign(self, view, state):
            scrawl(view)
            return []

    parts = {
        "commit": {"retain": Commits()},
        "open": {"retain": Opens()},
        "event": {"retain": Hears()},
        "observe": {"retain": Observes()},
        "pick": {"select": Picks()},
        "assign": {"precision": Assigns()},
    }
    return parts[kind]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("kind", ["commit", "open", "event", "observe", "pick", "assign"])
def test_a_part_that_writes_into_its_view_is_refused(kind, tensor):
    session = session_of(policy(**writer(kind, tensor)))
    with pytest.raises(ValueError, match=r"part '\w+' \(layer [01], chunk [01]\).*clone\(\)"):
        drive(session, list(passes(1)), 1)
        step = list(passes(2))[3]
        session.event(Event("scene_cut", 2), step)
        drive(session, [step], 1)


def test_a_positions_part_that_writes_into_its_view_is_refused():
    @dataclass(frozen=True)
    class Moves(PositionsPart):
        def lags(self, view, state, selection=None):
            return view.time.sub_(view.step.start).neg_().unsqueeze(1)

    with pytest.raises(ValueError, match=r"'Moves' \(layer 0, chunk [01]\).*clone\(\)"):
        drive(session_of(policy(positions=Moves())), passes(2), 1)


@pytest.mark.parametrize("mode", ["run", "scratch", "grad"])
def test_refusals_hold_in_every_mode(mode):
    session = session_of(policy(positions=Near(), select=WrongReads(answer=lambda v: "all")))
    drive(session, list(passes(4))[:3], 1)
    step = replace(list(passes(4))[3], mode=mode)
    if mode == "scratch":  # nothing is decided, so nothing can be wrong
        drive(session, [step], 1)
        return
    with pytest.raises(ValueError, match="answered str"):
        drive(session, [step], 1)
