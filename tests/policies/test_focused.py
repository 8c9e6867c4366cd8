"""Focused reading: its scores against double loops, its choices against a slow twin."""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import slow
from slow import (
    STORAGE,
    Ask,
    FocusedRule,
    FocusedScript,
    RollingScript,
    Scattered,
    agree,
    field,
    held,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    stores,
    tape,
)

from lightning_kv import rollout
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.plan import masks
from lightning_kv.policies.registry import build_budget, build_part
from lightning_kv.policies.scored import top_units
from lightning_kv.policies.select.focused import Focused
from lightning_kv.policies.statistics import (
    diversity,
    pooled,
    pooled_flight,
    pooled_keys,
    standardised,
    token_group,
)
from lightning_kv.testing import chunked

TOKENS, HEADS = sessions.GEOMETRY.tokens, sessions.GEOMETRY.heads


def focused(**settings):
    return build_part("select", {"part": "focused", "budget": "3f", **settings})


def meet(view, keys, extra=0.0):
    """Let the queries of a view meet other keys of what is held."""
    view.keys = lambda name="read": keys
    view.joint_keys = torch.cat([keys, view.own_keys() + extra], dim=1)


def views(question, steps=None, retain="everything", seed=0, dtype=torch.float32, **other):
    """Show every view of a drive to a function."""
    on = session(policy(retain=retain, select=Ask(question=question), **other))
    recorded = tape(steps or passes(4, noisy=1), seed=seed)
    play(on, [(step, layer, *(x.to(dtype) for x in qkv)) for step, layer, *qkv in recorded])
    return on


# -- scores ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_pooled_vector_is_the_double_mean_over_token_groups(data):
    """The dot product of two pooled frames is the mean logit over all pairs of their groups."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    tokens = data.draw(st.integers(1, 7))
    groups = data.draw(st.integers(1, tokens + 1))
    share = data.draw(st.floats(0, 1))
    rows = {}
    for frame in range(2):
        some = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens, unique=True)
        places = data.draw(some)
        rows[frame] = [(p, torch.randn(6, generator=rng, dtype=torch.float64)) for p in places]
    flat = [(frame, p, x) for frame in rows for p, x in rows[frame]]
    place = torch.tensor([p for _, p, _ in flat])
    bucket = torch.tensor([f for f, _, _ in flat]) * groups + token_group(place, tokens, groups)
    found = pooled(torch.stack([x for *_, x in flat])[None], bucket[None], (2, groups), share)[0]
    one, other = (slow.pools(rows[f], tokens, groups, share) for f in range(2))
    assert float(found[0] @ found[1]) == pytest.approx(
        slow.pooled_logit(one, other) * math.sqrt(6), abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20))
def test_token_groups_are_runs_of_nearly_equal_length(tokens, groups):
    index = token_group(torch.arange(tokens), tokens, groups).tolist()
    assert index == sorted(index) and index[0] >= 0 and index[-1] < groups
    if groups <= tokens:
        sizes = [index.count(g) for g in range(groups)]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.floats(-20, 20),
)
def test_standardised_scores(values, there, constant):
    """Population deviation over what is there; the rest is 0; a constant changes nothing."""
    values = [round(x, 2) for x in values]
    there = there[: len(values)]
    score, present = torch.tensor([values], dtype=torch.float64), torch.tensor([there])
    found = standardised(score, present)[0]
    known = [x for x, t in zip(values, there, strict=True) if t]
    expected = iter(slow.zscores(known) if known else [])
    for x, t in zip(found.tolist(), there, strict=True):
        assert x == pytest.approx(next(expected) if t else 0.0, abs=1e-6)
    torch.testing.assert_close(standardised(score + constant, present)[0], found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.3, 1e6])
def test_scores_without_any_spread_become_zero(value):
    score = torch.full((2, 3, 5), value)
    assert not standardised(score, torch.ones(1, 1, 5).bool()).any()
    assert not standardised(score, torch.zeros(1, 1, 5).bool()).any()


@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (1, 5)])
@pytest.mark.parametrize("storage", STORAGE)
def test_scores_of_ragged_memory_equal_slow_loops(storage, grid, monkeypatch):
    """Every head holds other rows; scores come per query frame and per head."""
    slow.world(monkeypatch, grid)
    tokens, seen = sessions.GEOMETRY.tokens, []

    def question(view):
        if view.step.chunk < 3:
            return
        groups = view.layer + 2  # 3 groups of 4 or 6 tokens: uneven
        found = {
            "key": pooled_keys(view, groups, 0.3),
            "query": pooled_flight(view, view.query, groups, 0.3),
            "unlike": diversity(view),
            "lse": view.frame_logits(True),
            "both": view.frame_logits(False),
        }
        ids = view.frame_ids.tolist()
        for h in range(view.heads):
            past = {}
            for r in held(view, h):
                past.setdefault(r["frame_id"], {})[r["place"]] = r["key"]
            assert past.keys() <= set(ids)
            query = view.query[h].double().unflatten(0, (-1, tokens))
            unlike = slow.unlikeness(past)
            for i, f in enumerate(ids):
                if f not in past:
                    assert torch.isinf(found["lse"][h, :, i]).all()
                    continue
                keys = list(past[f].values())
                key = slow.pools(past[f].items(), tokens, groups, 0.3)
                assert float(found["unlike"][h, i]) == pytest.approx(unlike[f], abs=1e-5)
                sums = []
                for j, own in enumerate(query):
                    mine = slow.pools(list(enumerate(own)), tokens, groups, 0.3)
                    logit = float(found["query"][h, j] @ found["key"][h, i]) / math.sqrt(12)
                    assert logit == pytest.approx(slow.pooled_logit(mine, key), abs=1e-5)
                    sums.append(slow.mean_lse(own, keys))
                    assert float(found["lse"][h, j, i]) == pytest.approx(sums[-1], abs=1e-5)
                mean = statistics.fmean(sums)
                assert float(found["both"][h, 0, i]) == pytest.approx(mean, abs=1e-5)
                seen.append(len(keys))

    views(question, retain=Scattered(), positions=STORAGE[storage])
    assert len(set(seen)) > 1, "frames should hold different numbers of rows"


# -- the choice ------------------------------------------------------------------------------

RULES = {
    "the paper's": FocusedRule(3),
    "uneven groups": FocusedRule(4, groups=3, mean_share=0.2, anchors=2),
    "attention alone": FocusedRule(3, attention_weight=1.0),
    "diversity alone": FocusedRule(3, attention_weight=0.0),
    "all query frames together": FocusedRule(3, per_query_frame=False, refresh="chunk"),
    "log-sum-exp": FocusedRule(3, score="lse", refresh="chunk"),
    "log-sum-exp together": FocusedRule(4, score="lse", per_query_frame=False, start=3),
    "mass": FocusedRule(3, score="mass", attention_weight=1.0, anchors=1),
    "over the chunk too": FocusedRule(3, standardise="all", attention_weight=0.46),
    "over the chunk too, diversity": FocusedRule(3, standardise="all", attention_weight=0.0),
    "mass together": FocusedRule(2, score="mass", per_query_frame=False, anchors=0, start=4),
}


@pytest.mark.parametrize(("name", "rule"), RULES.items(), ids=RULES)
def test_a_drive_equals_the_slow_twin(name, rule):
    made = policy(select=rule.settings())
    script = FocusedScript(rule)
    agree(made, script, tape(passes(5, noisy=1), seed=7))
    chosen = {tuple(frames) for own in script.kept.values() for frames in own.values()}
    assert len(chosen) > 1, "streams and query frames should choose differently"
    assert all(len(frames) == rule.budget for frames in chosen)


class WindowedFocus(FocusedScript):
    def commit(self, stream, step):
        frames = sorted({r.frame for r in stream.rows})
        kept = [f for f in frames if f < 1] + [f for f in frames if f >= 1][-5:]
        stream.rows = [r for r in stream.rows if r.frame in kept]


@pytest.mark.parametrize("storage", STORAGE)
def test_it_reads_what_a_window_keeps(storage):
    """Anchors are the first held frames, and history that is gone is gone."""
    window = {"part": "window", "budget": "6f", "sink": 1}
    rule = FocusedRule(4)
    made = policy(retain=window, select=rule.settings(), positions=STORAGE[storage])
    agree(made, WindowedFocus(rule), tape(passes(6, noisy=1), batch=2), batch=2)


SPANS = ((1, 4, 7), (2, 5, 3))  # frames that each head of each layer keeps


class RaggedFocus(FocusedScript):
    def commit(self, stream, step):
        frames = sorted({r.frame for r in stream.rows})
        kept = frames[-SPANS[stream.layer][stream.head] :]
        stream.rows = [r for r in stream.rows if r.frame in kept]


@pytest.mark.parametrize("score", ["logit", "lse"])
def test_heads_that_hold_other_frames_choose_among_their_own(score):
    """A head that holds no more than the budget reads all; anchors are its own first frames."""
    shares = [[x / 7 for x in own] for own in SPANS]
    window = {"part": "window", "budget": {"part": "table", "amount": "7f", "shares": shares}}
    rule = FocusedRule(3, score=score)
    made = policy(retain=window, select=rule.settings())
    script = RaggedFocus(rule)
    agree(made, script, tape(passes(6, noisy=1), seed=4))
    counts = {len(frames) for own in script.kept.values() for frames in own.values()}
    assert counts == {1, 2, 3}


@pytest.mark.parametrize(("grid", "chunk"), [((3, 2), 1), ((1, 2), 3), ((2, 3), 2)])
def test_other_grids_and_chunks(grid, chunk, monkeypatch):
    slow.world(monkeypatch, grid, chunk)
    rule = FocusedRule(4)
    made = policy(select=rule.settings())
    agree(made, FocusedScript(rule), tape(passes(6 // chunk + 2, noisy=1), seed=3))


def test_exactly_the_budget_with_the_anchor_and_the_chunk():
    """The anchor counts in the budget; the current chunk is read on top of it, always."""
    seen = []

    def question(view):
        if view.step.chunk < 3:
            return
        for budget in range(1, 6):
            for anchors in (0, 1, 3):
                part = focused(budget=f"{budget}f", anchors=anchors)
                chosen = part.pick(view, {})
                assert chosen.frames.shape == (HEADS, 2, len(view.frame_ids))
                assert (chosen.frames.sum(-1) == budget).all()
                if anchors:
                    assert chosen.frames[..., :anchors].any(-1).all()
                past, flight = masks(chosen, view)
                assert flight is None, "all frames in flight are read"
                assert (past.sum(-1) == budget * TOKENS).all()
                seen.append(chosen.frames[..., 0].float().mean().item())

    views(question)
    assert len(set(seen)) > 1


def test_the_anchor_is_the_best_of_the_first_three_whatever_the_others_score():
    """With room for one frame it is the anchor, although a later frame scores higher."""
    later = []

    def question(view):
        if view.step.chunk < 3:
            return
        part = focused(budget="1f", score="lse")
        score = part.scores(view, {})
        frames = part.pick(view, {}).frames
        for h in range(view.heads):
            for j in range(2):
                own = score[h, j].tolist()
                assert frames[h, j].nonzero().item() == own.index(max(own[:3]))
                later.append(max(own[3:]) > max(own[:3]))

    views(question)
    assert any(later)


def test_equal_frames_go_by_their_index():
    """Frames that cannot be told apart score zero, not NaN, and the smaller index is read."""
    asked = []

    def question(view):
        if view.step.chunk < 3:
            return
        meet(view, view.keys()[:, :TOKENS].repeat(1, len(view.frames), 1))
        for score in ("logit", "lse", "mass"):
            part = focused(score=score, budget="4f")
            assert not part.scores(view, {}).any()
            assert part.pick(view, {}).frames[..., :4].all()
            asked.append(score)

    views(question)
    assert len(asked) == 2 * 2 * 3  # two passes of the last chunk, two layers, three scores


@pytest.mark.parametrize("score", ["logit", "lse", "mass"])
def test_adding_a_constant_to_all_logits_changes_nothing(score):
    """A vector added to every key adds the same to all logits of a query; in float64, as rounding
    could turn a close choice."""
    moved = []

    def question(view):
        if view.step.chunk < 3:
            return
        part = focused(score=score, attention_weight=1.0)
        scores, before, keys = part.scores(view, {}), part.pick(view, {}).frames, view.keys()
        assert keys.dtype == torch.float64
        extra = torch.randn(12, generator=torch.Generator().manual_seed(view.layer)).double()
        meet(view, keys + extra, extra)
        torch.testing.assert_close(part.scores(view, {}), scores, atol=1e-9, rtol=0)
        assert bool((part.pick(view, {}).frames == before).all())
        meet(view, keys * extra)  # this does change the order
        assert (part.scores(view, {}) - scores).abs().max() > 1e-3
        moved.append(bool((part.pick(view, {}).frames != before).any()))
        meet(view, keys)

    views(question, dtype=torch.float64)
    assert any(moved)


@pytest.mark.parametrize(
    ("start", "chunk", "first"),
    [("paper", 3, 6), ("paper", 2, 9), ("budget", 3, 2), (4, 3, 4), (0, 3, 2)],
)
def test_when_it_starts(start, chunk, first, monkeypatch):
    """The paper's chunk is that in which a window of 21 frames is full (6 for chunks of 3)."""
    slow.world(monkeypatch, (1, 2), chunk)
    asked = {}

    def question(view):
        asked[view.step.chunk] = focused(budget="3f", start=start).pick(view, {}) is not None

    views(question, passes(11, noisy=1))
    assert [c for c, selects in asked.items() if selects] == list(range(first, 11))


@pytest.mark.parametrize("sizes", [[3] * 6 + [1], [3] * 7 + [2]])
def test_a_short_last_chunk_starts_as_any_other(sizes, monkeypatch):
    """The paper's chunk follows from the model's chunks, not from how long this one is."""
    slow.world(monkeypatch, (1, 2), 3, known=True)
    asked = {}

    def question(view):
        asked[view.step.chunk] = focused(budget="3f", start="paper").pick(view, {}) is not None

    views(question, chunked(sizes, 1))
    assert [c for c, selects in asked.items() if selects] == list(range(6, len(sizes)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_frames_that_are_held_in_part_fill_a_budget_by_their_rows(data):
    frames = data.draw(st.integers(1, 6))
    each = {"min_size": frames, "max_size": frames}
    score = data.draw(st.lists(st.integers(-2, 2), **each))
    size = data.draw(st.lists(st.integers(0, 4), **each))
    safe = [f for f in range(frames) if size[f] and data.draw(st.booleans())]
    room = data.draw(st.integers(0, 4 * frames))
    picked = top_units(
        torch.tensor(score).double().view(1, 1, -1),
        torch.tensor([[room]]),
        torch.tensor([f in safe for f in range(frames)]).view(1, 1, -1),
        torch.tensor(size).view(1, 1, -1),
    )
    rest = {f: score[f] for f in range(frames) if size[f] and f not in safe}
    left = room - sum(size[f] for f in safe)
    expected = safe + slow.filling(slow.best_of(rest, frames), size, left)
    assert picked.flatten().nonzero().flatten().tolist() == sorted(expected)


# -- after an event --------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared(Focused):
    """Chooses with what it remembers, and checks that it would choose the same without."""

    seen: ClassVar[list] = []

    def pick(self, view, state):
        found, fresh = super().pick(view, state), {}
        again = super().pick(view, fresh)
        assert (found is None) == (again is None)
        if found is None:
            return None
        assert torch.equal(found.frames, again.frames)
        for key, (_, made) in fresh.items():
            assert torch.equal(state[key][1], made), key
        self.seen.append((view.step, view.layer, view.frames, found.frames))
        return found


def compared(amount):
    Compared.seen.clear()
    return Compared(budget=build_budget(amount))


@pytest.mark.parametrize("storage", STORAGE)
def test_after_a_flush_it_picks_from_what_is_held(storage):
    """Of the sink and the newest frame, in the passes of the next chunk and of later ones."""
    window = {"part": "window", "budget": "9f", "sink": 3, "switch": "flush"}
    made = policy(retain=window, select=compared("2f"), positions=STORAGE[storage])

    def event(on, step):
        if step.chunk == 4:
            on.event(Event("prompt_switch", step.start, "other"), step)

    on = session(made)
    play(on, tape(passes(7)), event=event)
    held_frames = {step.chunk: frames for step, _, frames, _ in Compared.seen}
    assert held_frames[3] == (0, 1, 2, 3, 4, 5)
    assert held_frames[4] == (0, 1, 2, 7)
    assert held_frames[5] == (0, 1, 2, 7, 8, 9)
    for *_, frames, chosen in Compared.seen:
        assert chosen.shape[2] == len(frames) and (chosen.sum(-1) == 2).all()
    for head in range(HEADS):
        ids = field(stores(on)[0], "frame_id", head).tolist()
        assert sorted(set(ids)) == [0, 1, 2, 8, 9, 10, 11, 12, 13]


def test_after_a_rebuild_it_knows_the_new_rows(panorama):
    """Memory holds as many rows as before, of the same frames, but other ones."""
    diversities = {}
    for switch in ("recache", "keep"):
        window = {"part": "window", "budget": "9f", "sink": 3, "switch": switch}
        made = policy(retain=window, select=compared("4f"))
        event = Event("prompt_switch", 15, "night slow n4 left")
        found = rollout(
            panorama, made, "noon fast n7 left", frames=21, events=[event], decode=False
        )
        assert (found.costs[0].rebuilt_frames > 0) == (switch == "recache")
        (first, *_) = (x for x in Compared.seen if x[0].chunk == 5 and x[1] == 0)
        assert first[2] == (0, 1, 2, 9, 10, 11, 12, 13, 14)
        assert {step.chunk for step, *_ in Compared.seen} == {2, 3, 4, 5, 6}
        diversities[switch] = found.session.samples[0].states["cond"]["select"]["diversity", 0][1]
    assert not torch.allclose(diversities["recache"], diversities["keep"], atol=1e-4)


# -- what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "once", "each"),
    [
        # Rows pooled and compared once per chunk, then frames per head and query frame.
        ({}, lambda f: 2 * f * TOKENS, lambda f: 2 * f),
        ({"attention_weight": 1.0}, lambda f: f * TOKENS, lambda f: 2 * f),
        ({"attention_weight": 0.0}, lambda f: f * TOKENS, lambda f: 0),
        ({"per_query_frame": False}, lambda f: 2 * f * TOKENS, lambda f: f),
        # Every query meets every row.
        ({"score": "lse"}, lambda f: f * TOKENS, lambda f: 2 * TOKENS * f * TOKENS),
        (
            {"score": "mass", "attention_weight": 1.0},
            lambda f: 0,
            lambda f: 2 * TOKENS * f * TOKENS,
        ),
    ],
    ids=["logit", "attention", "diversity", "together", "lse", "mass"],
)
@pytest.mark.parametrize("refresh", ["pass", "chunk"])
def test_scored_keys_have_a_closed_form(settings, once, each, refresh):
    select = {"part": "focused", "budget": "3f", "refresh": refresh, **settings}
    on = session(policy(select=select))
    play(on, tape(passes(4)))
    streams, asked = 2 * HEADS, {"pass": 3, "chunk": 1}[refresh]
    expected = sum(once(f) + asked * each(f) for f in (4, 6))
    assert on.costs[0].rows_scored == streams * expected
    read = sum(min(3, f) for f in (2, 4, 6)) * TOKENS
    assert on.costs[0].rows_read == streams * 3 * 2 * TOKENS * read


# -- several chunks in flight ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "flight", "first", "apart", "storage"),
    [
        (FocusedRule(2), 2, (0, 0), True, "rotated"),
        (FocusedRule(2), 2, (0, 0), False, "raw"),
        # More in flight than held: quotas for both.
        (FocusedRule(3, groups=3), 3, (1, 2), True, "raw"),
        (FocusedRule(3, groups=3, mean_share=0.9), 3, (1, 2), False, "rotated"),
        (FocusedRule(3, anchors=1, attention_weight=1.0), 2, (0, 0), True, "rotated"),
        (FocusedRule(3, anchors=0), 3, (2, 0), True, "raw"),
    ],
)
def test_rolling_equals_the_slow_twin(rule, flight, first, apart, storage):
    made = policy(select=rolling_part(rule, *first), positions=STORAGE[storage])
    script = RollingScript(rule, *first)
    agree(made, script, tape(rolling(5, flight, apart), seed=2))
    assert script.quotas, "something should be left out"


def rolling_part(rule, denoise_start, commit_start):
    return {
        "part": "focused-rolling",
        "budget": f"{rule.budget}f",
        "attention_weight": rule.attention_weight,
        "groups": rule.groups,
        "mean_share": rule.mean_share,
        "anchors": rule.anchors,
        "denoise_start": denoise_start,
        "commit_start": commit_start,
    }


@pytest.mark.parametrize(("grid", "chunk"), [((3, 1), 1), ((1, 2), 3)])
def test_rolling_on_other_grids_and_chunks(grid, chunk, monkeypatch):
    slow.world(monkeypatch, grid, chunk)
    rule = FocusedRule(3)
    made = policy(select=rolling_part(rule, 1, 2))
    agree(made, RollingScript(rule, 1, 2), tape(rolling(5, 3), batch=2), batch=2)


def test_rolling_reads_itself_an_early_frame_and_its_quota():
    """Budgets of held frames and the own chunk together, shared in proportion."""
    seen = []

    def question(view):
        if view.step.phase == "commit" or view.step.chunk < 4:
            return
        middle, flight = len(view.frame_ids) - 3, view.query_frames
        for budget in range(1, 8):  # of 8 frames
            part = {"part": "focused-rolling", "budget": f"{budget}f", "denoise_start": 0}
            chosen = build_part("select", part).pick(view, {})
            past, now = chosen.frames, chosen.current
            assert (past[..., :3].sum(-1) == 1).all(), "one of the first three frames"
            assert now.diagonal(dim1=1, dim2=2).all()
            total = past.sum(-1) + now.sum(-1)
            assert (total == min(budget + 2, 1 + middle + flight)).all()
            share = min(budget * middle // (middle + flight - 1), middle)
            assert (past.sum(-1) == 1 + share).all()
            seen.append(share)

    views(question, rolling(5, 2))
    assert len(set(seen)) > 3


# -- limits ----------------------------------------------------------------------------------


EVERYTHING = ["100f", "1", {"part": "table", "amount": "8f", "shares": [[1, 1, 1]] * 2}]


def against_full(select, recorded):
    """All outputs of a selection, and of the full cache."""
    return [
        torch.cat(play(session(made, backend="reference"), recorded), 1)
        for made in (policy(select=select), policy())
    ]


def assert_full(select, recorded):
    """As the full cache; not so with a budget that is too small."""
    torch.testing.assert_close(*against_full(select, recorded), atol=1e-5, rtol=0)
    ours, full = against_full(select | {"budget": "3f"}, recorded)
    assert (ours - full).abs().max() > 1e-3


@pytest.mark.parametrize("score", ["logit", "lse", "mass"])
@pytest.mark.parametrize("budget", EVERYTHING)
def test_a_budget_of_everything_is_the_full_cache(budget, score):
    """Also where the budget is no uniform one, so that frames are scored first."""
    select = {"part": "focused", "budget": budget, "score": score}
    assert_full(select, tape(passes(5, noisy=1)))


@pytest.mark.parametrize("anchors", [0, 3])
@pytest.mark.parametrize("budget", [b for b in EVERYTHING if b != "1"])
def test_rolling_with_a_budget_of_everything_is_the_full_cache(budget, anchors):
    """Everything: what is held and what is in flight."""
    assert_full(all_rolling(budget, anchors), tape(rolling(4, 2)))


def all_rolling(budget, anchors=3, **settings):
    """A selection in all passes."""
    starts = {"denoise_start": 0, "commit_start": 0} | settings
    return {"part": "focused-rolling", "budget": budget, "anchors": anchors, **starts}


def test_rolling_budgets_that_cover_what_is_held_leave_out_what_is_in_flight():
    """A head that may read all 6 held frames and 2 more reads 8 of 10, not all."""
    seen = []

    def question(view):
        if view.step.chunk < 3 or view.step.phase == "commit":
            return
        chosen = build_part("select", all_rolling("6f")).pick(view, {})
        assert (chosen.frames.sum(-1) + chosen.current.sum(-1) == 8).all()
        assert (chosen.frames[..., :3].sum(-1) == 1).all()
        seen.append(chosen)

    views(question, rolling(4, 2))
    assert len(seen) == 2


@pytest.mark.parametrize(("reach", "budget", "room"), [(7, 3, 0), (9, 3, 2), (9, 8, 3)])
def test_rolling_reads_within_reach(reach, budget, room):
    """The first three frames, as many of the newest as there is room for, and the query of 4; at a
    commit the newest alone, with a query of 2. A budget of more, the next chunk included, widens
    the reach."""
    seen = []

    def question(view):
        if view.step.chunk < 5:
            return
        first, denoise = view.step.start, view.step.phase == "denoise"
        near = {
            *range(first - room - (0 if denoise else 5), first),
            *((0, 1, 2) if denoise else ()),
        }
        part = build_part("select", all_rolling(f"{budget}f", reach=reach))
        chosen = part.pick(view, {}).frames.flatten(0, 1).any(0)
        read = {view.frames[i] for i in chosen.nonzero()}
        assert read <= near and len(read) > 1
        assert {f for f, x in zip(view.frames, part.near(view)[0], strict=True) if x} == near
        seen.append(view.step.phase)

    views(question, rolling(6, 2))
    assert {"denoise", "commit"} == set(seen)


def test_a_sample_of_a_batch_is_as_if_alone():
    made = policy(retain=Scattered(), select=focused(budget="2f"))
    recorded = tape(passes(5, noisy=1), batch=2)
    both = play(session(made, 2), recorded)
    for b in range(2):
        alone = [(step, layer, *(x[b : b + 1] for x in qkv)) for step, layer, *qkv in recorded]
        for whole, own in zip(both, play(session(made), alone), strict=True):
            torch.testing.assert_close(whole[b : b + 1], own, atol=1e-6, rtol=0)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"attention_weight": 1.5}, r"attention_weight=1\.5 .* must be from 0 to 1"),
        ({"attention_weight": -0.1}, r"attention_weight=-0\.1 .* must be from 0 to 1"),
        ({"mean_share": 2.0}, r"mean_share=2\.0 .* must be from 0 to 1"),
        ({"score": "mean"}, r"score='mean' .* logit, lse, mass"),
        ({"start": "soon"}, r"cannot start at 'soon'.*budget, paper, or the number"),
        ({"anchors": -1}, r"anchors=-1 .* 0 or more"),
        ({"groups": 0}, r"groups=0 .* 1 or more"),
        ({"start": -1}, r"start=-1 .* 0 or more"),
        ({"attention_weight": float("nan")}, r"attention_weight=nan .* must be from 0 to 1"),
        ({"refresh": "never"}, "neither 'pass' nor 'chunk'"),
        ({"standardise": "chunk"}, r"standardise='chunk' .* history, all"),
        ({"standardise": "all", "score": "lse"}, r"standardise='all' .* Use score: logit"),
    ],
)
@pytest.mark.parametrize("part", ["focused", "focused-rolling"])
def test_settings_that_cannot_work_are_refused(part, settings, text):
    with pytest.raises(ValueError, match=text):
        build_part("select", {"part": part, "budget": "3f", **settings})


@pytest.mark.parametrize("weight", [0, 1])
def test_a_share_may_be_written_as_a_whole_number(weight):
    """YAML reads `attention_weight: 1` as an integer."""
    assert focused(attention_weight=weight) == focused(attention_weight=float(weight))


def test_more_groups_than_tokens_are_refused():
    with pytest.raises(ValueError, match=r"groups=5 .* must be from 1 to 4"):
        policy(select=focused(groups=5)).check(sessions.GEOMETRY, 2, 12)
    policy(select=focused(groups=4)).check(sessions.GEOMETRY, 2, 12)


def test_rolling_refuses_what_it_cannot_do():
    for wrong, text in (
        ({"score": "lse"}, r"score='lse' .* Use score: logit"),
        ({"per_query_frame": False}, r"per_query_frame=False .* Use per_query_frame: True"),
        ({"refresh": "chunk"}, r"refresh='chunk' .* Use refresh: pass"),
        ({"start": 4}, r"start=4 .* Use start: budget"),
        ({"denoise_start": -1}, r"denoise_start=-1 .* 0 or more"),
        ({"commit_start": -2}, r"commit_start=-2 .* 0 or more"),
        ({"reach": 0}, r"reach=0 .* 1 or more"),
    ):
        with pytest.raises(ValueError, match=text):
            build_part("select", {"part": "focused-rolling", "budget": "3f", **wrong})
