"""Every kind of decision, run through the cache and through its slow twin."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from twin import CHUNK, GEOMETRY, Row, Script, Twin, drive, passes, turn

from lightning_kv.cache.codecs import CODECS, Integer
from lightning_kv.cache.decisions import Merge, Recode, Retention, Selection
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.base import CachePolicy, PrecisionPart, RetainPart, SelectPart
from lightning_kv.policies.presets import build_part, policy_from_dict

TOKENS = GEOMETRY.tokens
# Absolute positions hold rotated keys, a clamp that never bites holds raw ones: same numbers.
STORAGE = {"rotated": "absolute", "raw": {"part": "clamp", "lag": 10_000}}


def policy(retain="everything", select="everything", positions="absolute", bias=None, **other):
    parts = {"retain": retain, "select": select, "positions": positions}
    built = {k: build_part(k, x) if isinstance(x, str | dict) else x for k, x in parts.items()}
    precision = other.get("precision") or build_part("precision", "as-computed")
    return CachePolicy("test", **built, precision=precision, bias=bias)


def assert_both_agree(made, script, batch=2, chunks=5, backend="sdpa", steps=None):
    """Outputs of the session and of the twin must agree; returns both."""
    session = CacheSession(GEOMETRY, made.start, tuple(range(batch)), backend)
    twin = Twin(batch, script)
    steps = list(steps or passes(chunks))
    ours, theirs = drive(session, steps, batch), drive(twin, steps, batch)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, i=i: f"call {i}: {m}")
    return session, twin


def assert_same_rows(session, twin):
    """Memory and archive of both hold the same rows."""
    for (b, layer, h), stream in twin.streams.items():
        cell = session.lanes["cond", b].cells[layer]
        for held, rows in ((cell.memory, stream.rows), (cell.archive, stream.archive)):
            group, position = held.stream(h)
            k = group.payload("k")[position].double()
            for name, attribute in (
                ("frame_id", "frame"),
                ("time", "time"),
                ("place", "place"),
                ("weight", "weight"),
            ):
                mine = group.expanded(name)[position].tolist()
                theirs = [getattr(r, attribute) for r in rows]
                assert mine == pytest.approx(theirs, abs=1e-5), (name, b, layer, h)
            for name in cell.columns:
                mine = group.expanded(name)[position].tolist()
                assert mine == pytest.approx([r.columns[name] for r in rows], abs=1e-4), name
            if rows and cell.rotated:
                expected = torch.stack([turn(r.k, r.time, r.place) for r in rows])
            elif rows:
                expected = torch.stack([r.k.double() for r in rows])
            else:
                expected = k.new_zeros(0, GEOMETRY.head_dim)
            torch.testing.assert_close(k, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_full_cache(backend):
    session, twin = assert_both_agree(policy(), Script(), backend=backend)
    assert_same_rows(session, twin)


# -- retain ----------------------------------------------------------------------------------


class WindowScript(Script):
    def __init__(self, budget, sink):
        self.budget, self.sink = budget, sink

    def commit(self, stream, step):
        frames = sorted({r.frame for r in stream.rows})
        sink = [f for f in frames if f < self.sink]
        late = [f for f in frames if f >= self.sink][-(self.budget - len(sink)) :]
        stream.rows = [r for r in stream.rows if r.frame in sink + late]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("budget", "sink"), [(3, 0), (4, 1), (5, 3)])
def test_window(budget, sink, storage):
    made = policy(
        {"part": "window", "budget": f"{budget}f", "sink": sink}, positions=STORAGE[storage]
    )
    assert_same_rows(*assert_both_agree(made, WindowScript(budget, sink)))


@dataclass(frozen=True)
class EvenAtOpen(RetainPart):
    """When a chunk opens: the rows whose key agrees with the mean query, and the last chunk."""

    when: ClassVar[str] = "open"

    def decide(self, views, state):
        (view,) = views
        if view.step.chunk < 2:
            return None
        keep = []
        for h in range(view.heads):
            group, position = view.cell.memory.stream(h)
            index = view.groups.index(group)
            mean = view.query[h].mean(0)
            recent = group.expanded("frame_id")[position] >= view.step.start - CHUNK
            keep.append(((view.read_keys[index][position] @ mean > 0) | recent).nonzero().flatten())
        return [Retention(keep=keep)]


class EvenScript(Script):
    def open(self, stream, step, q):
        if step.chunk < 2:
            return
        mean = sum(
            turn(q[i], step.query_times[i // TOKENS], i % TOKENS) for i in range(len(q))
        ) / len(q)
        stream.rows = [
            r
            for r in stream.rows
            if r.frame >= step.start - CHUNK or float(turn(r.k, r.time, r.place) @ mean) > 0
        ]


def test_open_retention_decides_with_the_queries_at_hand():
    session, twin = assert_both_agree(policy(EvenAtOpen()), EvenScript())
    assert_same_rows(session, twin)
    lengths = {len(stream.rows) for stream in twin.streams.values()}
    assert len(lengths) > 1, "the streams should be ragged"


@dataclass(frozen=True)
class Fold(RetainPart):
    """Old rows become two merged rows per place: one source feeds both."""

    columns: ClassVar[dict[str, str]] = {
        "total": "sum",
        "best": "max",
        "mark": "keep",
        "level": "mean",
    }
    align: str = "raw"
    shift: float = 0.25

    def decide(self, views, state):
        return [self.fold(view) for view in views]

    def fold(self, view):
        write = {}
        for name in self.columns:
            value = [f.float() + view.layer for f in view.column("frame_id")]
            if view.step.chunk == 0:
                write[name] = value
            else:  # only the new rows get a value, the old ones carry theirs
                old = view.column(name)
                newest = [f >= view.step.start for f in view.column("frame_id")]
                write[name] = [
                    torch.where(n, x, o) for n, x, o in zip(newest, value, old, strict=True)
                ]
        if view.step.chunk < 2:
            return Retention(write=write)
        keep, merge = [], []
        for h, frame in enumerate(view.column("frame_id")):
            place, weight = view.column("place")[h], view.column("weight")[h]
            old = frame < view.step.start
            if h == 0:  # one head merges nothing: the streams become ragged
                keep.append(torch.arange(len(frame)))
                merge.append(None)
                continue
            keep.append((~old).nonzero().flatten())
            source = old.nonzero().flatten().repeat(2)
            half = len(source) // 2
            target = place[source].long()
            target[half:] += TOKENS
            coefficient = weight[source] * torch.cat(
                [torch.full((half,), 0.125), torch.full((half,), 0.2)]
            )
            frames = torch.full((2 * TOKENS,), view.step.start - 1)
            times = frames + self.shift
            places = torch.arange(TOKENS).repeat(2)
            merge.append(
                Merge(
                    source,
                    target,
                    coefficient,
                    frames,
                    times,
                    places,
                    align=self.align,
                    correction=torch.full((2 * TOKENS, GEOMETRY.head_dim), 0.1),
                )
            )
        return Retention(keep=keep, merge=merge, write=write)


class FoldScript(Script):
    def __init__(self, align, shift=0.25):
        self.align, self.shift = align, shift

    def fresh(self, row):
        row.columns = dict.fromkeys(Fold.columns, 0.0)
        return row

    def commit(self, stream, step):
        for r in stream.rows:
            if step.chunk == 0 or r.frame >= step.start:
                r.columns = dict.fromkeys(Fold.columns, float(r.frame + stream.layer))
        if step.chunk < 2 or stream.head == 0:
            return
        old = [r for r in stream.rows if r.frame < step.start]
        fresh = [r for r in stream.rows if r.frame >= step.start]
        for factor in (0.125, 0.2):
            for place in range(TOKENS):
                fresh.append(self.merged([r for r in old if r.place == place], factor, place, step))
        stream.rows = fresh

    def merged(self, sources, factor, place, step):
        time = step.start - 1 + self.shift
        shares = [factor * r.weight for r in sources]
        if self.align == "raw":
            k = sum(s * r.k.double() for s, r in zip(shares, sources, strict=True))
        else:
            k = sum(s * turn(r.k, r.time, r.place) for s, r in zip(shares, sources, strict=True))
            k = turn(k, time, place, sign=-1)
        best = max(range(len(shares)), key=lambda i: (shares[i], -i))
        values = {name: [r.columns[name] for r in sources] for name in Fold.columns}
        return Row(
            step.start - 1,
            time,
            place,
            k + 0.1,
            sum(s * r.v.double() for s, r in zip(shares, sources, strict=True)),
            weight=sum(r.weight for r in sources),
            columns={
                "total": sum(values["total"]),
                "best": max(values["best"]),
                "mark": values["mark"][best],
                "level": sum(s * x for s, x in zip(shares, values["level"], strict=True))
                / sum(shares),
            },
        )

    def bias(self, stream, step, frame, index, row):
        return math.log(row.weight)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("align", ["raw", "relative"])
def test_merges_columns_and_fractional_times(align, storage):
    made = policy(Fold(align=align), positions=STORAGE[storage], bias="log_weight")
    session, twin = assert_both_agree(made, FoldScript(align))
    assert_same_rows(session, twin)
    times = session.lanes["cond", 0].cells[0].memory.column("time")[1]
    assert bool((times % 1 == 0.25).any()), "some times should be fractional"


@dataclass(frozen=True)
class Shelf(RetainPart):
    """The first chunk goes to the archive; at chunk 3 its frames come back at other times."""

    columns: ClassVar[dict[str, str]] = {"mark": "keep"}

    def decide(self, views, state):
        return [self.shelve(view) for view in views]

    def shelve(self, view):
        frames = view.column("frame_id")
        if view.step.chunk == 1:
            first = [(f < CHUNK).nonzero().flatten() for f in frames]
            return Retention(keep=[(f >= CHUNK).nonzero().flatten() for f in frames], archive=first)
        if view.step.chunk == 3:
            length = view.cell.archive.lengths[0]
            back = torch.arange(length).flip(0)  # named in another order than they lie
            return Retention(
                keep=torch.arange(2, len(frames[0])),
                restore=back,
                restore_time=100.5 - back.float(),
                restore_copy=view.layer == 1,
                discard=torch.tensor([0]) if view.layer == 1 else None,
                time=torch.arange(2, len(frames[0])).float() / 2,
            )
        return None


class ShelfScript(Script):
    def fresh(self, row):
        row.columns = {"mark": 0.0}
        return row

    def commit(self, stream, step):
        if step.chunk == 1:
            stream.archive = [r for r in stream.rows if r.frame < CHUNK]
            stream.rows = [r for r in stream.rows if r.frame >= CHUNK]
        if step.chunk == 3:
            stream.rows = [r.clone(time=i / 2) for i, r in enumerate(stream.rows) if i >= 2]
            stream.rows += [r.clone(time=100.5 - i) for i, r in enumerate(stream.archive)]
            stream.archive = stream.archive[1:] if stream.layer == 1 else []


@pytest.mark.parametrize("storage", STORAGE)
def test_archive_and_new_times(storage):
    made = policy(Shelf(), positions=STORAGE[storage])
    session, twin = assert_both_agree(made, ShelfScript(), chunks=3)
    assert_same_rows(session, twin)
    before = session.held_bytes(0)
    empty = CacheSession(GEOMETRY, policy(positions=STORAGE[storage]).start, (0, 1))
    drive(empty, passes(3))
    assert before >= empty.held_bytes(0), "archived rows are counted"
    assert_same_rows(*assert_both_agree(made, ShelfScript()))


# -- select ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByParity(SelectPart):
    """Query frame f of head h reads the frames of its parity, of its own chunk only itself."""

    def pick(self, view, state):
        head = torch.arange(view.heads).view(-1, 1, 1)
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        frames = (view.frame_ids.view(1, 1, -1) + query + head) % 2 == 0
        own = torch.tensor(view.step.frames).view(1, 1, -1) == query
        return Selection(frames=frames, current=own.expand(view.heads, -1, -1))


class ParityScript(Script):
    def reads(self, stream, step, frame, index, row, current):
        return row.frame == frame if current else (row.frame + frame + stream.head) % 2 == 0


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_selection_for_each_query_frame(backend):
    assert_both_agree(policy(select=ByParity()), ParityScript(), backend=backend)


@dataclass(frozen=True)
class ByRow(SelectPart):
    """Rows by place, ragged over heads and query frames, with a bias; provisional rows too."""

    def pick(self, view, state):
        rows, bias = [], []
        for h, place in enumerate(view.column("place")):
            place = torch.cat([place, torch.arange(TOKENS).repeat(view.query_frames)])
            turns = torch.arange(view.query_frames).view(-1, 1)
            rows.append((place.view(1, -1) + turns + h) % 3 > 0)
            bias.append(0.3 * place.float().expand(view.query_frames, -1) + turns)
        return Selection(rows=rows, bias=bias)


class RowScript(Script):
    def reads(self, stream, step, frame, index, row, current):
        return (row.place + step.frames.index(frame) + stream.head) % 3 > 0

    def bias(self, stream, step, frame, index, row):
        return 0.3 * row.place + step.frames.index(frame)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_selection_of_rows_with_a_bias(backend):
    assert_both_agree(policy(select=ByRow()), RowScript(), backend=backend)


@dataclass(frozen=True)
class OnlyBias(SelectPart):
    """Reads everything, with a bias for each query frame."""

    whole: bool = True

    def pick(self, view, state):
        bias = [
            torch.cat([f.float(), torch.full((view.cell.provisional,), 2.0)]).expand(CHUNK, -1)
            * torch.tensor([[0.1], [0.2]])
            for f in view.column("frame_id")
        ]
        frames = None if self.whole else torch.ones(view.heads, 1, len(view.frame_ids)).bool()
        if frames is not None and frames.shape[2] > 2:
            frames[:, :, 0] = False
        return Selection(frames=frames, bias=bias)


class OnlyBiasScript(Script):
    def __init__(self, whole):
        self.whole = whole

    def reads(self, stream, step, frame, index, row, current):
        return self.whole or current or row.frame > 0 or step.chunk < 2

    def bias(self, stream, step, frame, index, row):
        level = row.frame if index < len(stream.rows) else 2.0
        return level * (0.1, 0.2)[step.frames.index(frame)]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_bias_for_each_query_frame(whole, backend):
    assert_both_agree(policy(select=OnlyBias(whole=whole)), OnlyBiasScript(whole), backend=backend)


# -- budget: ragged lengths, per head and per sample -----------------------------------------


@dataclass(frozen=True)
class Ragged(RetainPart):
    """Head h of layer l of the sample with seed s keeps its last 1 + (h + l + s) % 3 frames."""

    def decide(self, views, state):
        out = []
        for view in views:
            last = torch.tensor([[1 + (h + view.layer + view.seed) % 3] for h in range(view.heads)])
            newest = int(view.frame_ids[-1])
            out.append(Retention(keep=view.rows_of(view.frame_ids.view(1, -1) > newest - last)))
        return out


class RaggedScript(Script):
    def commit(self, stream, step):
        last = 1 + (stream.head + stream.layer + stream.sample) % 3
        newest = stream.rows[-1].frame
        stream.rows = [r for r in stream.rows if r.frame > newest - last]


@pytest.mark.parametrize("storage", STORAGE)
def test_ragged_lengths_in_a_batch(storage):
    session, twin = assert_both_agree(
        policy(Ragged(), positions=STORAGE[storage]), RaggedScript(), batch=3
    )
    assert_same_rows(session, twin)
    even = CacheSession(GEOMETRY, policy({"part": "window", "budget": "3f"}).start, (0,))
    drive(even, passes(), 1)
    assert session.held_bytes(0) < even.held_bytes(0), "a smaller head must free memory"


def test_budget_table_gives_each_head_its_share():
    shares = [[0.5, 1.0, 1.5], [1.0, 1.0, 0.25]]
    budget = {"part": "table", "amount": "4f", "shares": shares}
    session = CacheSession(GEOMETRY, policy({"part": "window", "budget": budget}).start, (0,))
    drive(session, passes(), 1)
    for layer, row in enumerate(shares):
        lengths = session.lanes["cond", 0].cells[layer].memory.lengths
        assert lengths == {h: round(4 * share) * TOKENS for h, share in enumerate(row)}


# -- several chunks in flight ----------------------------------------------------------------


def rolling(apart):
    """Two chunks in flight; the older one is committed apart, or as a part of the same pass."""
    for chunk in range(4):
        flight = tuple(range(chunk * CHUNK, (chunk + 2) * CHUNK))
        oldest = flight[:CHUNK]
        levels = (250.0,) * CHUNK + (750.0,) * CHUNK
        yield Pass("denoise", flight, levels, chunk, 0, () if apart else oldest, True, CHUNK)
        if apart:
            yield Pass("commit", oldest, (0.0,) * CHUNK, chunk, 0, oldest, False, CHUNK)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_several_chunks_in_flight(storage, apart):
    window = {"part": "window", "budget": "3f", "sink": 1}
    made = policy(window, select=ByParity(), positions=STORAGE[storage])

    class Both(WindowScript, ParityScript):
        pass

    session, twin = assert_both_agree(made, Both(3, 1), steps=rolling(apart))
    assert_same_rows(session, twin)
    assert session.lanes["cond", 0].cells[0].memory.column("frame_id")[0].max() == 7


# -- positions -------------------------------------------------------------------------------


class TimeScript(WindowScript):
    def __init__(self, rule):
        super().__init__(5, 2)
        self.rule = rule

    def time(self, stream, step, row):
        frames = sorted({r.frame for r in stream.rows}, reverse=True)
        return self.rule(row, step.start, 1 + frames.index(row.frame))


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ("contiguous", lambda row, start, rank: start - rank),
        ({"part": "clamp", "lag": 3}, lambda row, start, rank: max(row.time, start - 3)),
        (
            {"part": "sink-lag", "sink": 2, "lag": 6},
            lambda row, start, rank: (
                max(row.time, start - 6 + row.frame) if row.frame < 2 else row.time
            ),
        ),
    ],
)
def test_positions(part, rule):
    made = policy({"part": "window", "budget": "5f", "sink": 2}, positions=part)
    assert_both_agree(made, TimeScript(rule))


def test_contiguous_positions_of_an_unbroken_window_change_nothing():
    window = {"part": "window", "budget": "4f"}
    runs = []
    for positions in ("absolute", "contiguous"):
        session = CacheSession(GEOMETRY, policy(window, positions=positions).start, (0, 1))
        runs.append(drive(session, passes(6)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# -- invariants ------------------------------------------------------------------------------


def test_noisy_passes_leave_committed_rows_alone():
    session = CacheSession(GEOMETRY, policy({"part": "window", "budget": "3f"}).start, (0, 1))
    held, checked = {}, []

    def rows():
        return {
            (b, layer): [
                (group.payload("k").clone(), group.payload("v").clone(), group.meta["time"].clone())
                for group in session.lanes["cond", b].cells[layer].memory.groups
            ]
            for b in range(2)
            for layer in range(GEOMETRY.layers)
        }

    def check(step):  # after the model's pass, before it is closed
        if step.chunk == 0:
            return
        now = rows()
        for key, groups in held.items():
            for old, new in zip(groups, now[key], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
                checked.append(step.phase)

    finish = session.finish

    def close(step):
        answer = finish(step)
        if step.final:
            held.clear()
            held.update(rows())
        return answer

    session.finish = close
    drive(session, passes(), check=check)
    assert checked.count("denoise") == 4 * 2 * 4


def test_merging_two_equal_rows_under_log_weight_changes_nothing():
    @dataclass(frozen=True)
    class Pair(RetainPart):
        def decide(self, views, state):
            rows = 2 * TOKENS
            source = torch.arange(rows)
            merge = Merge(
                source,
                source % TOKENS,
                torch.full((rows,), 0.5),
                torch.zeros(TOKENS),
                torch.zeros(TOKENS),
                torch.arange(TOKENS),
            )
            return [Retention(keep=torch.arange(0), merge=merge)] * len(views)

    rng = torch.Generator().manual_seed(3)
    shape = (1, TOKENS, GEOMETRY.heads, GEOMETRY.head_dim)
    k, v, q = (torch.randn(shape, generator=rng) for _ in range(3))
    twice = Pass("commit", (0, 1), (0.0, 0.0), 0, final=(0, 1), opens=True, times=(0.0, 0.0))
    ask = Pass("denoise", (2,), (500.0,), 1, opens=True)
    out = []
    for made in (policy(), policy(Pair(), bias="log_weight")):
        session = CacheSession(GEOMETRY, made.start, (0,))
        for layer in range(GEOMETRY.layers):
            session.attend(layer, *(torch.cat([x, x], dim=1) for x in (q, k, v)), twice)
        session.finish(twice)
        out.append(session.attend(0, q, k, v, ask))
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)
    assert session.lanes["cond", 0].cells[0].memory.lengths[0] == TOKENS


def test_held_bytes_are_the_tensors():
    session = CacheSession(GEOMETRY, policy().start, (0,))
    drive(session, passes(3), 1)
    rows = 3 * CHUNK * TOKENS
    payload = 2 * rows * GEOMETRY.heads * GEOMETRY.head_dim * 4
    assert session.held_bytes(0) == GEOMETRY.layers * (payload + rows * 4 * 4)
    cost = session.costs[0]
    assert cost.peak_bytes == session.held_bytes(0)
    assert cost.chunk_bytes[0] < cost.chunk_bytes[1] < cost.chunk_bytes[2]


def test_memory_of_a_window_is_bounded_in_length():
    session = CacheSession(GEOMETRY, policy({"part": "window", "budget": "4f"}).start, (0,))
    drive(session, passes(12, noisy=1), 1)
    late = session.costs[0].chunk_bytes[4:]
    assert len(set(late)) == 1


def test_rows_read_have_a_closed_form():
    session = CacheSession(
        GEOMETRY, policy({"part": "window", "budget": "2f"}).start, (0,), context_frames=2
    )
    drive(session, passes(4), 1)
    queries = CHUNK * TOKENS * 3  # two noisy passes and the commit
    streams = GEOMETRY.layers * GEOMETRY.heads
    assert session.costs[0].rows_read == streams * queries * (2 + 2 + 2) * TOKENS
    assert session.costs[0].rows_scored == 0


def test_top_attention_counts_the_keys_it_scores():
    select = {"part": "top-attention", "budget": "2f"}
    session = CacheSession(GEOMETRY, policy(select=select).start, (0,))
    drive(session, passes(3), 1)
    streams, queries = GEOMETRY.layers * GEOMETRY.heads, CHUNK * TOKENS * 3
    assert session.costs[0].rows_scored == streams * queries * 4 * TOKENS  # the third chunk only
    assert session.costs[0].rows_read == streams * queries * (2 + 2) * TOKENS


# -- precision -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCodec(PrecisionPart):
    """Head 0 as computed, head 1 in int8, head 2 in int4; the newest chunk stays as it is."""

    def assign(self, view, state):
        rows = [(f < view.step.start).nonzero().flatten() for f in view.column("frame_id")]
        none = torch.arange(0)
        return [Recode("int8", [none, rows[1], none]), Recode("int4", [none, none, rows[2]])]


@pytest.mark.parametrize("storage", STORAGE)
def test_codecs_per_head(storage):
    window = {"part": "window", "budget": "5f", "sink": 1}
    plain = CacheSession(GEOMETRY, policy(window, positions=STORAGE[storage]).start, (0,))
    coded = CacheSession(
        GEOMETRY, policy(window, positions=STORAGE[storage], precision=HeadCodec()).start, (0,)
    )
    drive(plain, passes(6), 1)
    drive(coded, passes(6), 1)
    for a, b in zip(plain.lanes["cond", 0].cells, coded.lanes["cond", 0].cells, strict=True):
        for head, bound in ((0, 0.0), (1, 1 / 254), (2, 1 / 14)):
            (ga, pa), (gb, pb) = a.memory.stream(head), b.memory.stream(head)
            order = torch.argsort(gb.expanded("frame_id")[pb] * TOKENS + gb.expanded("place")[pb])
            for name in ("k", "v"):
                x, y = ga.payload(name)[pa], gb.payload(name)[pb][order]
                step = x.abs().amax(-1, keepdim=True) * bound
                assert bool(((x - y).abs() <= step + 1e-6).all()), (head, name)
                assert head == 0 or not torch.equal(x, y)
    assert coded.held_bytes(0) < plain.held_bytes(0)


def test_aged_rows_are_coded_once_and_survive_eviction():
    made = policy_from_dict(
        {
            "name": "q",
            "retain": {"part": "window", "budget": "6f"},
            "precision": {"part": "aged", "codec": "int4", "age": 2},
        }
    )
    session = CacheSession(GEOMETRY, made.start, (0,))
    codes = {}

    def check(step):
        for group in session.lanes["cond", 0].cells[0].memory.groups:
            for segment in group.segments:
                if segment.codec:
                    frames = group.meta["frame_id"][0][: len(segment)]
                    for i, f in enumerate(frames.tolist()):
                        now = segment.rows["k.codes"][:, i]
                        assert torch.equal(codes.setdefault((f, i % TOKENS), now.clone()), now)

    drive(session, passes(8), 1, check=check)
    assert len(codes) > 6 * TOKENS


def test_two_bit_centroids_shrink_the_cache():
    made = policy_from_dict({"name": "q", "precision": {"part": "aged", "codec": "int2-centroids"}})
    session = CacheSession(GEOMETRY, made.start, (0,))
    plain = CacheSession(GEOMETRY, policy().start, (0,))
    ours, exact = drive(session, passes(6), 1), drive(plain, passes(6), 1)
    first = GEOMETRY.layers * 3  # calls of the first chunk, before anything is coded
    assert all(torch.equal(a, b) for a, b in zip(ours[:first], exact[:first], strict=True))
    assert not torch.equal(ours[-1], exact[-1])
    assert session.held_bytes(0) < 0.8 * plain.held_bytes(0)


def test_centroids_beat_plain_two_bits_on_clustered_rows():
    rng = torch.Generator().manual_seed(0)
    centre = 5 * torch.randn(2, 8, 24, generator=rng)
    x = centre.repeat(1, 32, 1) + 0.3 * torch.randn(2, 256, 24, generator=rng)
    error = {}
    for name, codec in (("plain", Integer(2)), ("centroids", CODECS["int2-centroids"])):
        error[name] = (codec.decode(*codec.encode(x)) - x).square().mean()
    assert error["centroids"] < 0.1 * error["plain"]


# -- needs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking(RetainPart):
    needs: ClassVar[dict] = {"query_moments": {}, "attention_mass": {}}

    def decide(self, views, state):
        state["moments"] = views[1].collected["query_moments"]
        state["mass"] = views[1].column("mass")
        return None


def test_collected_statistics_equal_slow_ones():
    session = CacheSession(GEOMETRY, policy(Asking()).start, (0,))
    drive(session, passes(3), 1)
    state = session.lanes["cond", 0].decider.states["retain"]
    rng = torch.Generator().manual_seed(0)
    queries, keys, mass = [], [], [0.0] * (3 * CHUNK * TOKENS)
    for step in passes(3):
        for layer in range(GEOMETRY.layers):
            q, k, _ = (
                torch.randn((1, CHUNK * TOKENS, 3, 12), generator=rng)[0, :, 2] for _ in range(3)
            )
            if layer != 1 or step.phase != "commit":
                continue
            queries.append(q)
            where = [(step.frames[i // TOKENS], i % TOKENS) for i in range(len(q))]
            keys += [turn(x, *at) for x, at in zip(k, where, strict=True)]
            for x, at in zip(q, where, strict=True):
                logits = torch.stack([turn(x, *at) @ key for key in keys]) / math.sqrt(12)
                for i, share in enumerate(logits.softmax(0).tolist()):
                    mass[i] += share
    seen = torch.cat(queries).double()
    found = state["moments"]
    assert found.count == 3
    torch.testing.assert_close(found.mean[2, 0].double(), seen.mean(0))
    variance = seen.var(0, unbiased=False).view(-1, 2).sum(1)
    torch.testing.assert_close(found.variance[2].double(), variance)
    assert state["mass"][2].tolist() == pytest.approx(mass, rel=1e-4)


def test_a_need_that_nothing_meets_is_said_at_once():
    @dataclass(frozen=True)
    class Greedy(RetainPart):
        needs: ClassVar[dict] = {"reference_mass": {}}

    with pytest.raises(ValueError, match=r"reference_mass.*can give: attention_mass"):
        CacheSession(GEOMETRY, policy(Greedy()).start, (0,))
    session = CacheSession(GEOMETRY, policy(Greedy()).start, (0,), tables={"reference_mass": 1})
    drive(session, passes(1), 1)


@pytest.mark.parametrize(
    ("decision", "text"),
    [
        (Retention(keep=torch.tensor([99])), r"names row 99 of head 0, which has 8"),
        (Retention(restore=torch.tensor([0])), r"names archive row 0 of head 0, which has 0"),
        (Retention(write={"nothing": torch.zeros(8)}), r"column 'nothing', which no part declares"),
        (Retention(time=torch.zeros(1)), r"gives 1 values for head 0, which has 8"),
        (
            Retention(
                merge=Merge(
                    torch.tensor([-1]), torch.tensor([0]), torch.ones(1), *[torch.zeros(1)] * 3
                )
            ),
            r"names rows -1 to -1 of 8",
        ),
    ],
)
def test_impossible_decisions_are_refused(decision, text):
    @dataclass(frozen=True)
    class Wrong(RetainPart):
        def decide(self, views, state):
            return [decision] * len(views)

    session = CacheSession(GEOMETRY, policy(Wrong()).start, (0,))
    with pytest.raises(ValueError, match=text):
        drive(session, passes(1), 1)


def test_a_part_that_answers_start_is_refused():
    @dataclass(frozen=True)
    class Early(RetainPart):
        def event(self, event, views, state):
            return [None] * len(views)

    session = CacheSession(GEOMETRY, policy(Early()).start, (0,))
    with pytest.raises(ValueError, match="answered the event 'start'"):
        drive(session, passes(1), 1)


def test_parts_that_disagree_about_a_column_are_refused():
    @dataclass(frozen=True)
    class Other(SelectPart):
        columns: ClassVar[dict[str, str]] = {"mark": "sum"}

    with pytest.raises(ValueError, match=r"column 'mark' \(sum\)"):
        CacheSession(GEOMETRY, policy(Shelf(), select=Other()).start, (0,)).lane(
            0, "cond", torch.zeros(1)
        )


def test_scoring_in_blocks_changes_nothing(monkeypatch):
    """Attention mass is the same a query at a time, and frame by frame adds up to the whole."""
    found = {}
    for block in (1, 2**25):
        monkeypatch.setattr("lightning_kv.cache.view.BLOCK", block)
        masses = []

        @dataclass(frozen=True)
        class Ask(SelectPart):
            def pick(self, view, state, masses=masses):
                masses.append(view.per_frame(view.attention(per_query_frame=True)))
                masses.append(view.per_frame(view.attention()))
                return None

        drive(CacheSession(GEOMETRY, policy(select=Ask()).start, (0,)), passes(3), 1)
        found[block] = masses
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)
    for split, whole in zip(found[1][::2], found[1][1::2], strict=True):
        torch.testing.assert_close(split.sum(1, keepdim=True), whole)


def test_random_with_a_table_runs_from_the_first_chunk():
    budget = {"part": "table", "amount": "4f", "shares": [[1, 1, 1]] * 2}
    session = CacheSession(
        GEOMETRY, policy(select={"part": "random", "budget": budget}).start, (0,)
    )
    drive(session, passes(4), 1)
    assert session.costs[0].rows_read == 6 * 8 * 3 * (2 + 4 + 4) * TOKENS


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
def test_bfloat16_merges_do_not_lose_small_terms(positions):
    """1560 rows of one are 1560 in a sum, although bfloat16 alone stops at 256."""

    @dataclass(frozen=True)
    class Sum(RetainPart):
        def decide(self, views, state):
            rows = 520 * TOKENS
            merge = Merge(
                torch.arange(rows),
                torch.zeros(rows).long(),
                torch.ones(rows),
                torch.zeros(1),
                torch.zeros(1),
                torch.zeros(1),
                align="relative",
            )
            return [Retention(keep=torch.arange(0), merge=merge)] * len(views)

    frames = tuple(range(520))
    step = Pass("commit", frames, (0.0,) * 520, 0, final=frames, opens=True, times=(0.0,) * 520)
    session = CacheSession(GEOMETRY, policy(Sum(), positions=positions).start, (0,))
    x = torch.ones(1, 520 * TOKENS, GEOMETRY.heads, GEOMETRY.head_dim, dtype=torch.bfloat16)
    for layer in range(GEOMETRY.layers):
        assert session.attend(layer, x, x, x, step).dtype == torch.bfloat16
    session.finish(step)
    group = session.lanes["cond", 0].cells[0].memory.groups[0]
    assert group.payload("v").dtype == torch.bfloat16
    assert float(group.payload("v")[0, 0, 0]) == pytest.approx(2080, rel=0.01)
