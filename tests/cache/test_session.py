"""Every kind of decision, run through the cache and through its slow twin."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rules import PLACES, TOKENS, ByParity, Fold, FoldScript, ParityScript, WindowScript
from sessions import (
    CHUNK,
    GEOMETRY,
    STORAGE,
    assert_both_agree,
    assert_same_rows,
    copies,
    drive,
    passes,
    policy,
    rolling,
    session_of,
    store_of,
    stream_of,
    turn,
)

from lightning_kv.cache.codecs import CODECS, Integer
from lightning_kv.cache.decisions import Recode, Retention, Selection, Sums
from lightning_kv.cache.passes import Pass
from lightning_kv.policies.base import PrecisionPart, RetainPart, SelectPart
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.testing import Script


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_full_cache(backend):
    session, twin = assert_both_agree(policy(), Script(), backend=backend)
    assert_same_rows(session, twin)


# -- retain ----------------------------------------------------------------------------------


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

    moments: ClassVar[tuple[str, ...]] = ("open",)

    def open(self, view, state):
        if view.step.chunk < 2:
            return None
        agrees = torch.einsum("hnd,hd->hn", view.keys("read"), view.query.mean(1)) > 0
        recent = view.frame_id >= view.step.start - CHUNK
        return Retention(keep=(agrees | recent) & view.valid)


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


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("align", ["raw", "relative"])
def test_merges_columns_and_fractional_times(align, storage):
    made = policy(Fold(align=align), positions=STORAGE[storage], bias="log_weight")
    session, twin = assert_both_agree(made, FoldScript(align))
    assert_same_rows(session, twin)
    times = stream_of(store_of(session).memory, 1)["time"]
    assert bool((times % 1 == 0.25).any()), "some times should be fractional"


@dataclass(frozen=True)
class Shelf(RetainPart):
    """The first chunk goes to the archive; at chunk 3 its frames come back at other times."""

    columns: ClassVar[dict[str, str]] = {"mark": "keep"}

    def commit(self, views, state):
        return [self.shelve(view) for view in views]

    def shelve(self, view):
        if view.step.chunk == 1:
            first = view.frame_id < CHUNK
            return Retention(keep=~first, archive=first)
        if view.step.chunk == 3:
            size = len(view.archive)
            back = torch.arange(size).flip(0)  # named in another order than they lie
            sums = copies(view, len(view) + torch.arange(size), 100.5 - torch.arange(size))
            pairs = {"source": len(view) + back.unsqueeze(0), "target": back.unsqueeze(0)}
            forgotten = torch.ones(1, size, dtype=torch.bool)
            if view.layer == 1:  # a copy comes back; all but one stay on the shelf
                forgotten[:, 1:] = False
            return Retention(
                sums=replace(sums, **pairs),
                discard=forgotten,
                time=torch.arange(len(view)).unsqueeze(0) / 2,
                keep=(torch.arange(len(view)) >= 2).unsqueeze(0),
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
    empty = session_of(policy(positions=STORAGE[storage]), 2)
    drive(empty, passes(3))
    assert before >= empty.held_bytes(0), "archived rows are counted"
    assert_same_rows(*assert_both_agree(made, ShelfScript()))


# -- select ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_selection_for_each_query_frame(backend):
    assert_both_agree(policy(select=ByParity()), ParityScript(), backend=backend)


@dataclass(frozen=True)
class ByRow(SelectPart):
    """Rows by place, ragged over heads and query frames, with a bias; provisional rows too."""

    def pick(self, view, state):
        own = torch.arange(TOKENS).repeat(view.query_frames)
        place = torch.cat([view.raster[0], own]).view(1, 1, -1)
        turns = torch.arange(view.query_frames).view(1, -1, 1)
        hit = (place + turns + torch.arange(view.heads).view(-1, 1, 1)) % 3 > 0
        rows, current = hit.split([len(view), view.flight], dim=2)
        return Selection(rows=rows, current=current, bias=0.3 * place + turns)


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
        level = torch.cat([view.frame_id[0].float(), torch.full((view.flight,), 2.0)])
        bias = level * torch.tensor([0.1, 0.2]).view(1, -1, 1)
        frames = None if self.whole else torch.ones(view.heads, 1, len(view.frames)).bool()
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

    def commit(self, views, state):
        out = []
        for view in views:
            last = torch.tensor([[1 + (h + view.layer + view.seed) % 3] for h in range(view.heads)])
            newest = view.frames[-1]
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
    even = session_of(policy({"part": "window", "budget": "3f"}))
    drive(even, passes(), 1)
    assert session.held_bytes(0) < even.held_bytes(0), "a smaller head must free memory"


def test_budget_table_gives_each_head_its_share():
    shares = [[0.5, 1.0, 1.5], [1.0, 1.0, 0.25]]
    budget = {"part": "table", "amount": "4f", "shares": shares}
    session = session_of(policy({"part": "window", "budget": budget}))
    drive(session, passes(), 1)
    for layer, row in enumerate(shares):
        lengths = store_of(session, layer).memory.lengths
        assert lengths == tuple(round(4 * share) * TOKENS for share in row)


# -- several chunks in flight ----------------------------------------------------------------


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_several_chunks_in_flight(storage, apart):
    window = {"part": "window", "budget": "3f", "sink": 1}
    made = policy(window, select=ByParity(), positions=STORAGE[storage])

    class Both(WindowScript, ParityScript):
        pass

    session, twin = assert_both_agree(made, Both(3, 1), steps=rolling(apart=apart))
    assert_same_rows(session, twin)
    assert store_of(session).frames[-1] == 7


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
        session = session_of(policy(window, positions=positions), 2)
        runs.append(drive(session, passes(6)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# -- invariants ------------------------------------------------------------------------------


def test_noisy_passes_leave_committed_rows_alone():
    session = session_of(policy({"part": "window", "budget": "3f"}), 2)
    held, checked = {}, []

    def rows():
        return {
            (b, layer): [
                (group.payload("k").clone(), group.payload("v").clone(), group.meta["time"].clone())
                for group in store_of(session, layer, b).memory.groups
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
        def commit(self, views, state):
            source, none = torch.arange(2 * TOKENS).unsqueeze(0), torch.zeros(1, TOKENS)
            half = torch.full((1, 2 * TOKENS), 0.5)
            sums = Sums(source, source % TOKENS, half, none.long(), none, PLACES)
            keep = torch.zeros(1, 2 * TOKENS, dtype=torch.bool)
            return [Retention(keep=keep, sums=sums)] * len(views)

    rng = torch.Generator().manual_seed(3)
    shape = (1, TOKENS, GEOMETRY.heads, GEOMETRY.head_dim)
    k, v, q = (torch.randn(shape, generator=rng) for _ in range(3))
    twice = Pass("commit", (0, 1), (0.0, 0.0), 0, final=(0, 1), opens=True, times=(0.0, 0.0))
    ask = Pass("denoise", (2,), (500.0,), 1, opens=True)
    out = []
    for made in (policy(), policy(Pair(), bias="log_weight")):
        session = session_of(made)
        for layer in range(GEOMETRY.layers):
            session.attend(layer, *(torch.cat([x, x], dim=1) for x in (q, k, v)), twice)
        session.finish(twice)
        out.append(session.attend(0, q, k, v, ask))
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)
    assert store_of(session).memory.lengths[0] == TOKENS


def test_held_bytes_are_the_tensors():
    session = session_of(policy())
    drive(session, passes(3), 1)
    rows = 3 * CHUNK * TOKENS
    payload = 2 * rows * GEOMETRY.heads * GEOMETRY.head_dim * 4
    assert session.held_bytes(0) == GEOMETRY.layers * (payload + rows * 5 * 4)
    cost = session.costs[0]
    assert cost.peak_bytes == session.held_bytes(0)
    assert cost.chunk_bytes[0] < cost.chunk_bytes[1] < cost.chunk_bytes[2]


def test_memory_of_a_window_is_bounded_in_length():
    session = session_of(policy({"part": "window", "budget": "4f"}))
    drive(session, passes(12, noisy=1), 1)
    late = session.costs[0].chunk_bytes[4:]
    assert len(set(late)) == 1


def test_rows_read_have_a_closed_form():
    session = session_of(policy({"part": "window", "budget": "2f"}), context_frames=2)
    drive(session, passes(4), 1)
    queries = CHUNK * TOKENS * 3  # two noisy passes and the commit
    streams = GEOMETRY.layers * GEOMETRY.heads
    assert session.costs[0].rows_read == streams * queries * (2 + 2 + 2) * TOKENS
    assert session.costs[0].rows_scored == 0


def test_top_attention_counts_the_keys_it_scores():
    select = {"part": "top-attention", "budget": "2f"}
    session = session_of(policy(select=select))
    drive(session, passes(3), 1)
    streams, queries = GEOMETRY.layers * GEOMETRY.heads, CHUNK * TOKENS * 3
    assert session.costs[0].rows_scored == streams * queries * 4 * TOKENS  # the third chunk only
    assert session.costs[0].rows_read == streams * queries * (2 + 2) * TOKENS


# -- precision -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCodec(PrecisionPart):
    """Head 0 as computed, head 1 in int8, head 2 in int4; the newest chunk stays as it is."""

    def assign(self, view, state):
        old = (view.frame_id < view.step.start) & view.valid
        head = torch.arange(view.heads).unsqueeze(1)
        return [Recode("int8", old & (head == 1)), Recode("int4", old & (head == 2))]


@pytest.mark.parametrize("storage", STORAGE)
def test_codecs_per_head(storage):
    window = {"part": "window", "budget": "5f", "sink": 1}
    plain = session_of(policy(window, positions=STORAGE[storage]))
    coded = session_of(policy(window, positions=STORAGE[storage], precision=HeadCodec()))
    drive(plain, passes(6), 1)
    drive(coded, passes(6), 1)
    for layer in range(GEOMETRY.layers):
        for head, bound in ((0, 0.0), (1, 1 / 254), (2, 1 / 14)):
            a, b = (stream_of(store_of(x, layer).memory, head) for x in (plain, coded))
            order = torch.argsort(b["frame_id"] * TOKENS + b["place"] @ torch.tensor([2.0, 1.0]))
            for name in ("k", "v"):
                x, y = a[name], b[name][order]
                step = x.abs().amax(-1, keepdim=True) * bound
                assert bool(((x - y).abs() <= step + 1e-6).all()), (head, name)
                assert head == 0 or (x - y).abs().max() > 1e-4
    assert coded.held_bytes(0) < plain.held_bytes(0)


def test_aged_rows_are_coded_once_and_survive_eviction():
    made = policy_from_dict(
        {
            "name": "q",
            "retain": {"part": "window", "budget": "6f"},
            "precision": {"part": "aged", "codec": "int4", "age": 2},
        }
    )
    session = session_of(made)
    codes = {}

    def check(step):
        for group in store_of(session).memory.groups:
            for segment in group.segments:
                if segment.codec:
                    frames = group.meta["frame_id"][0][: len(segment)]
                    for i, f in enumerate(frames.tolist()):
                        now = segment.rows["k.codes"][:, i]
                        assert torch.equal(codes.setdefault((f, i % TOKENS), now.clone()), now)

    drive(session, passes(8), 1, check=check)
    assert len(codes) > 6 * TOKENS


def test_two_bit_centroids_shrink_the_cache():
    made = policy_from_dict(
        {"name": "q", "precision": {"part": "aged", "codec": "quant-video-gen"}}
    )
    session = session_of(made)
    plain = session_of(policy())
    ours, exact = drive(session, passes(6), 1), drive(plain, passes(6), 1)
    first = GEOMETRY.layers * 3  # calls of the first chunk, before anything is coded
    for a, b in zip(ours[:first], exact[:first], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert (ours[-1] - exact[-1]).abs().max() > 1e-3
    assert session.held_bytes(0) < 0.8 * plain.held_bytes(0)


def test_centroids_beat_plain_two_bits_on_clustered_rows():
    rng = torch.Generator().manual_seed(0)
    centre = 5 * torch.randn(2, 8, 24, generator=rng)
    x = centre.repeat(1, 32, 1) + 0.3 * torch.randn(2, 256, 24, generator=rng)
    error = {}
    for name, codec in (("plain", Integer(2)), ("centroids", CODECS["quant-video-gen"].keys)):
        error[name] = (codec.decode(*codec.encode(x)) - x).square().mean()
    assert error["centroids"] < 0.1 * error["plain"]


# -- needs -----------------------------------------------------------------------------------


def test_a_need_that_nothing_meets_is_said_at_once():
    @dataclass(frozen=True)
    class Greedy(RetainPart):
        needs: ClassVar[dict] = {"reference_mass": {}}

    with pytest.raises(ValueError, match=r"needs reference_mass of the reference.*There: none"):
        session_of(policy(Greedy()))
    session = session_of(policy(Greedy()), tables={"reference_mass": [1]})
    drive(session, passes(1), 1)


def test_a_part_that_answers_start_is_refused():
    @dataclass(frozen=True)
    class Early(RetainPart):
        def event(self, event, views, state):
            return [None] * len(views)

    session = session_of(policy(Early()))
    with pytest.raises(ValueError, match="answered the event 'start'"):
        drive(session, passes(1), 1)


def test_parts_that_disagree_about_a_column_are_refused():
    @dataclass(frozen=True)
    class Other(SelectPart):
        columns: ClassVar[dict[str, str]] = {"mark": "sum"}

    with pytest.raises(ValueError, match=r"column 'mark' \(sum\)"):
        drive(session_of(policy(Shelf(), select=Other())), passes(1), 1)


def test_scoring_in_blocks_changes_nothing(monkeypatch):
    """Attention mass is the same a query at a time, and frame by frame adds up to the whole."""
    found = {}
    for block in (1, 2**25):
        monkeypatch.setattr("lightning_kv.cache.table.BLOCK", block)
        masses = []

        @dataclass(frozen=True)
        class Ask(SelectPart):
            def pick(self, view, state, masses=masses):
                masses.append(view.by_frame(view.attention(per_query_frame=True)[0]))
                masses.append(view.by_frame(view.attention()[0]))
                return None

        drive(session_of(policy(select=Ask())), passes(3), 1)
        found[block] = masses
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)
    for split, whole in zip(found[1][::2], found[1][1::2], strict=True):
        torch.testing.assert_close(split.sum(1, keepdim=True), whole)


def test_random_with_a_table_runs_from_the_first_chunk():
    budget = {"part": "table", "amount": "4f", "shares": [[1, 1, 1]] * 2}
    session = session_of(policy(select={"part": "random", "budget": budget}))
    drive(session, passes(4), 1)
    assert session.costs[0].rows_read == 6 * 8 * 3 * (2 + 4 + 4) * TOKENS


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
def test_bfloat16_merges_do_not_lose_small_terms(positions):
    """1560 rows of one are 1560 in a sum, although bfloat16 alone stops at 256."""

    @dataclass(frozen=True)
    class Sum(RetainPart):
        def commit(self, views, state):
            rows, zero = torch.arange(520 * TOKENS).unsqueeze(0), torch.zeros(1, 1)
            pairs = rows, torch.zeros_like(rows), torch.ones(rows.shape)
            spot = torch.zeros(1, 1, 2)
            sums = Sums(*pairs, zero.long(), zero, spot, align="relative")
            return [Retention(keep=torch.zeros_like(rows).bool(), sums=sums)] * len(views)

    frames = tuple(range(520))
    step = Pass("commit", frames, (0.0,) * 520, 0, final=frames, opens=True, times=(0.0,) * 520)
    session = session_of(policy(Sum(), positions=positions))
    x = torch.ones(1, 520 * TOKENS, GEOMETRY.heads, GEOMETRY.head_dim, dtype=torch.bfloat16)
    for layer in range(GEOMETRY.layers):
        assert session.attend(layer, x, x, x, step).dtype == torch.bfloat16
    session.finish(step)
    group = store_of(session).memory.groups[0]
    assert group.payload("v").dtype == torch.bfloat16
    assert float(group.payload("v")[0, 0, 0]) == pytest.approx(2080, rel=0.01)
