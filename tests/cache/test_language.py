"""What published policies need, each said by a part of a few lines.

The rows are those that some method cannot do without: what it looks at, what it may answer, and
when. Expected values are worked out from the queries, keys and values that go in.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from sessions import CHUNK, GEOMETRY, passes, policy, turn

from lightning_kv.cache.decisions import Event, Match, Retention, Selection, Sums
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.policies.base import PositionsPart, RetainPart, SelectPart
from lightning_kv.policies.statistics import update_last_queries, update_moments

TOKENS, HEADS, WIDTH = GEOMETRY.tokens, GEOMETRY.heads, GEOMETRY.head_dim
SIZES = replace(GEOMETRY, chunk=CHUNK, flight=CHUNK)


class Recorded:
    """A session, and what went through it."""

    def __init__(self, seed=0, **parts):
        settings = {name: parts.pop(name) for name in ("inputs", "tables") if name in parts}
        self.session = CacheSession(SIZES, policy(**parts), keys=["a"], **settings)
        self.rng, self.rows, self.out = torch.Generator().manual_seed(seed), {}, {}

    def run(self, steps):
        for step in steps:
            shape = (1, len(step.frames) * TOKENS, HEADS, WIDTH)
            for layer in range(SIZES.layers):
                q, k, v = (torch.randn(shape, generator=self.rng) for _ in range(3))
                self.rows[step.chunk, step.phase, step.step, layer] = q[0], k[0], v[0]
                out = self.session.attend(layer, q, k, v, step)
                self.out[step.chunk, step.phase, step.step, layer] = out[0]
            self.session.finish(step)
        return self

    def store(self, layer=0):
        return self.session.samples[0].stores["cond"][layer]

    def state(self, kind="retain"):
        return self.session.samples[0].states["cond"][kind]


def newest_and(view, chosen):
    """Keep what is chosen, and the newest chunk."""
    return chosen | (view.frame_id >= view.step.final[0])


# -- looking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByMeanQuery(RetainPart):
    """TetherCache's score: the mean logit of the commit pass's queries before rotation."""

    observes: ClassVar[tuple[str, ...]] = ("commit",)

    def observe(self, view, state):
        state[view.layer] = view.raw_query.mean(1)

    def commit(self, views, state):
        out = []
        for view in views:
            score = torch.einsum("hd,hnd->hn", state[view.layer], view.keys("raw"))
            out.append(Retention(keep=newest_and(view, score > 0)))
        return out


def test_a_part_sees_the_queries_of_a_commit_pass():
    found = Recorded(retain=ByMeanQuery()).run(passes(2))
    q = found.rows[1, "commit", 0, 1][0].mean(0)  # [H, D]
    first, last = found.rows[0, "commit", 0, 1][1], found.rows[1, "commit", 0, 1][1]
    for head in range(HEADS):
        kept = [t for t in range(len(first)) if float(first[t, head] @ q[head]) > 0]
        ids = [t // TOKENS for t in kept] + [CHUNK + t // TOKENS for t in range(len(last))]
        group = next(g for g in found.store(1).memory.groups if head in g.heads)
        line = group.heads.index(head) if len(group.meta["frame_id"]) > 1 else 0
        assert group.meta["frame_id"][line].tolist() == ids


@dataclass(frozen=True)
class LastQueries(RetainPart):
    """Deep Forcing's queries: the last rows of all passes, reaching into the chunk before."""

    moments: ClassVar[tuple[str, ...]] = ("open",)
    observes: ClassVar[tuple[str, ...]] = ("denoise", "commit")
    rows: int = CHUNK * TOKENS + 2

    def observe(self, view, state):
        update_last_queries(view, state, self.rows)

    def open(self, view, state):
        before = state.get("last_queries", {}).get(view.layer)
        state["asked", view.step.chunk, view.layer] = (before, view.query)


def test_the_last_rotated_queries_reach_back_over_passes():
    found = Recorded(retain=LastQueries()).run(passes(2))
    before, now = found.state()["asked", 1, 0]
    commit, noisy = found.rows[0, "commit", 0, 0][0], found.rows[0, "denoise", 1, 0][0]
    for head in range(HEADS):
        rows = [(noisy[t, head], t) for t in (len(noisy) - 2, len(noisy) - 1)]
        rows += [(commit[t, head], t) for t in range(len(commit))]
        wanted = torch.stack([turn(x, t // TOKENS, t % TOKENS) for x, t in rows])
        torch.testing.assert_close(before[head].double(), wanted, atol=1e-5, rtol=0)
    fresh = found.rows[1, "denoise", 0, 0][0]
    wanted = turn(fresh[0, 0], CHUNK, 0)
    torch.testing.assert_close(now[0, 0].double(), wanted, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class NoisyMean(SelectPart):
    """Echo's gate: the mean of the current noisy queries before rotation."""

    def pick(self, view, state):
        state[view.step.phase, view.step.step, view.layer] = view.raw_query.mean(1)


def test_a_part_sees_noisy_queries_before_rotation():
    found = Recorded(select=NoisyMean()).run(passes(1))
    mean = found.state("select")["denoise", 0, 1]
    torch.testing.assert_close(mean, found.rows[0, "denoise", 0, 1][0].mean(0))


@dataclass(frozen=True)
class Frozen(RetainPart):
    """Moments of clean queries, with their covariance, up to a frame."""

    observes: ClassVar[tuple[str, ...]] = ("commit",)
    until: int = 2 * CHUNK

    def observe(self, view, state):
        update_moments(view, state, covariance=True, until=self.until)


def test_moments_are_frozen_at_a_horizon():
    found = Recorded(retain=Frozen()).run(passes(4))
    seen = torch.cat([found.rows[chunk, "commit", 0, 0][0] for chunk in (0, 1)])  # [T, H, D]
    moments = found.state()["moments"][0]
    torch.testing.assert_close(moments.mean[:, 0], seen.mean(0), atol=1e-5, rtol=0)
    for head in range(HEADS):
        cov = torch.cov(seen[:, head].T, correction=0)
        torch.testing.assert_close(moments.covariance[head], cov, atol=1e-5, rtol=0)
        pairs = cov.diagonal().view(-1, 2).sum(1)
        torch.testing.assert_close(moments.variance[head], pairs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["absolute", {"part": "clamp", "lag": 10_000}])
def test_keys_before_rotation_do_not_depend_on_how_they_are_held(positions):
    seen = {}

    @dataclass(frozen=True)
    class Look(RetainPart):
        def commit(self, views, state):
            seen.update({view.layer: (view.keys("raw"), view.keys("read")) for view in views})

    found = Recorded(retain=Look(), positions=positions).run(passes(1))
    k = found.rows[0, "commit", 0, 1][1].transpose(0, 1)
    torch.testing.assert_close(seen[1][0], k, atol=1e-5, rtol=0)
    wanted = torch.stack([turn(k[2, t], t // TOKENS, t % TOKENS) for t in range(k.shape[1])])
    if positions == "absolute":
        torch.testing.assert_close(seen[1][1][2].double(), wanted, atol=1e-5, rtol=0)


# -- answering -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reservoir(RetainPart):
    """Rolling Sink's kind: the first chunk goes aside, and comes back later at other times."""

    def commit(self, views, state):
        chunk, out = views[0].step.chunk, []
        for view in views:
            if chunk == 0:
                every = torch.ones(1, len(view), dtype=torch.bool)
                out.append(Retention(archive=every, keep=~every))
            elif chunk == 2:
                size, aside = len(view), view.archive
                rows = torch.arange(len(aside)).unsqueeze(0)
                sums = Sums(
                    size + rows,
                    rows,
                    torch.ones(1, len(aside)),
                    aside.frame_id.long(),
                    aside.time + 0.5,
                    aside.place,
                )
                gone = torch.ones(1, len(aside), dtype=torch.bool)
                out.append(Retention(sums=sums, discard=gone))
            else:
                out.append(None)
        return out


def test_rows_beyond_the_window_come_back_from_an_archive():
    found = Recorded(retain=Reservoir()).run(passes(2))
    assert found.store().frames == (2, 3) and found.store().shelved == (0, 1)
    found.run(list(passes(3))[6:])
    store = found.store()
    assert store.frames == (0, 1, 2, 3, 4, 5) and store.shelved == ()
    (group,) = store.memory.groups
    back = group.meta["time"].expand(HEADS, -1)[0, -2 * TOKENS :]
    assert back.tolist() == [0.5] * TOKENS + [1.5] * TOKENS
    raw = found.rows[0, "commit", 0, 0][1]
    for t in range(2 * TOKENS):
        wanted = turn(raw[t, 1], t // TOKENS + 0.5, t % TOKENS)
        got = group.payload("k")[1, t - 2 * TOKENS].double()
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class FromLayerZero(SelectPart):
    """Relax Forcing: layer 0 decides, all others read the same frames."""

    def pick(self, view, state):
        if view.layer == 0:
            state["frames"] = tuple(view.frames[-1:])
        return Selection(frames=state["frames"])


@dataclass(frozen=True)
class AllTogether(RetainPart):
    """Dummy Forcing's ranking: the heads of all layers compete for a place."""

    observes: ClassVar[tuple[str, ...]] = ("commit",)

    def observe(self, view, state):
        held, own = view.attention()
        state[view.layer] = held.sum((1, 2)) / (held.sum((1, 2)) + own.sum((1, 2)))

    def commit(self, views, state):
        mass = torch.stack([state[view.layer] for view in views])  # [L, H]
        dummy = mass <= mass.flatten().sort().values[mass.numel() // 2 - 1]
        state["dummy"] = dummy
        return [Retention(keep=newest_and(view, ~dummy[view.layer].unsqueeze(1))) for view in views]


def test_one_layer_decides_for_others_and_all_layers_together():
    found = Recorded(select=FromLayerZero()).run(passes(3))
    plans = found.session.samples[0].plans
    assert {plan.selection.frames for plan in plans.values()} == {(3,)}
    found = Recorded(retain=AllTogether()).run(passes(2))
    dummy = found.state()["dummy"]
    assert int(dummy.sum()) == SIZES.layers * HEADS // 2
    for layer in range(SIZES.layers):
        lengths = found.store(layer).memory.lengths
        assert lengths == tuple(CHUNK * TOKENS * (1 if d else 2) for d in dummy[layer].tolist())


@dataclass(frozen=True)
class OwnBucket(SelectPart):
    """Pyramid Forcing: each query frame reads the frames of its own period."""

    def pick(self, view, state):
        query = torch.tensor(view.step.frames).view(1, -1, 1)
        return Selection(frames=(view.frame_ids.view(1, 1, -1) % 2) == query % 2)


@dataclass(frozen=True)
class OneLag(PositionsPart):
    """Pyramid Forcing: everything that is read lies at one lag from the query's own frame."""

    def lags(self, view, state, selection=None):
        return torch.full((1, view.query_frames, len(view)), 1.5)


def test_masks_and_positions_of_each_query_frame():
    found = Recorded(select=OwnBucket(), positions=OneLag()).run(passes(2))
    past = [found.rows[0, "commit", 0, 0][i] for i in (1, 2)]
    q, k, v = found.rows[1, "denoise", 0, 0]
    for token in (0, TOKENS + 1):
        frame = CHUNK + token // TOKENS
        rows = [t for t in range(CHUNK * TOKENS) if t // TOKENS % 2 == frame % 2]
        keys = [turn(past[0][t, 1], frame - 1.5, t % TOKENS) for t in rows]
        keys += [turn(k[t, 1], CHUNK + t // TOKENS, t % TOKENS) for t in range(len(k))]
        values = torch.cat([past[1][rows, 1], v[:, 1]]).double()
        query = turn(q[token, 1], frame, token % TOKENS)
        share = (torch.stack(keys) @ query / WIDTH**0.5).softmax(0)
        out = found.out[1, "denoise", 0, 0][token, 1].double()
        torch.testing.assert_close(out, share @ values, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Middle(RetainPart):
    """FadeMem and Pyramid: two frames become one, in the middle of both, at fractional places."""

    def commit(self, views, state):
        if views[0].step.chunk != 0:
            return None
        out = []
        for view in views:
            source = torch.arange(2 * TOKENS).unsqueeze(0)
            target = source % TOKENS
            share = torch.full((1, 2 * TOKENS), 0.5)
            place = view.place[:, :TOKENS] + torch.tensor([0.5, 0.25])
            ids, time = torch.zeros(1, TOKENS).long(), torch.full((1, TOKENS), 0.5)
            sums = Sums(source, target, share, ids, time, place)
            out.append(Retention(sums=sums, keep=torch.zeros(1, len(view), dtype=torch.bool)))
        return out


def test_sums_at_fractional_times_and_places():
    found = Recorded(retain=Middle()).run(passes(1))
    (group,) = found.store().memory.groups
    raw = found.rows[0, "commit", 0, 0][1]
    rotary = GEOMETRY.rotary
    for t in range(TOKENS):
        mean = (raw[t, 0] + raw[TOKENS + t, 0]).double() / 2
        row, column = t // 2 + 0.5, t % 2 + 0.25
        at = [torch.tensor(x, dtype=torch.float64) for x in (0.5, row, column)]
        pairs = torch.view_as_complex(mean.view(-1, 2).contiguous())
        wanted = torch.view_as_real(pairs * torch.exp(1j * rotary.angles(*at))).flatten()
        got = group.payload("k")[0, t].double()
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert group.meta["weight"].unique().tolist() == [2.0]


@dataclass(frozen=True)
class Tether(RetainPart):
    """TetherCache's TAME: newcomers are drawn to the statistics of what is trusted."""

    def commit(self, views, state):
        if views[0].step.chunk != 1:
            return None
        new = [view.frame_id >= view.step.final[0] for view in views]
        return [Retention(match=(Match(rows, ~rows, share=0.35),)) for rows in new]


def test_stored_keys_and_values_are_changed_by_mean_and_deviation():
    found = Recorded(retain=Tether()).run(passes(2))
    (group,) = found.store().memory.groups
    for which, name in ((1, "k"), (2, "v")):
        old, new = (found.rows[c, "commit", 0, 0][which][:, 1].double() for c in (0, 1))
        std = [x.std(0, correction=0) for x in (old, new)]
        wanted = 0.65 * new + 0.35 * (std[0] * (new - new.mean(0)) / std[1] + old.mean(0))
        got = group.payload(name)[1, CHUNK * TOKENS :].double()
        if name == "k":
            wanted = torch.stack(
                [turn(x, CHUNK + t // TOKENS, t % TOKENS) for t, x in enumerate(wanted)]
            )
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@dataclass(frozen=True)
class Tired(RetainPart):
    """Deep Forcing's reuse counter: a number for every row, which travels with it."""

    columns: ClassVar[dict[str, str]] = {"reused": "max"}

    def commit(self, views, state):
        out = []
        for view in views:
            reused = view.field("reused") + 1
            keep = newest_and(view, (reused <= 2) & (view.raster % 2 == 0))
            out.append(Retention(write={"reused": reused.expand(1, -1)}, keep=keep))
        return out


def test_a_number_for_every_row_travels_with_it():
    found = Recorded(retain=Tired()).run(passes(3))
    (group,) = found.store().memory.groups
    assert group.meta["reused"][0].tolist() == [2.0] * TOKENS + [1.0] * (CHUNK * TOKENS)


@dataclass(frozen=True)
class Quarantine(SelectPart):
    """TetherCache: the newest held frame is there, but noisy passes do not read it."""

    refresh: str = "pass"

    def pick(self, view, state):
        noisy = view.step.phase == "denoise"
        return Selection(frames=view.frames[:-1]) if noisy and view.frames else None


def test_rows_that_are_held_and_not_read_for_a_while():
    found = Recorded(select=Quarantine()).run(passes(2))
    per_query = SIZES.layers * HEADS * CHUNK * TOKENS * TOKENS
    assert found.session.costs[0].rows_read == per_query * (2 * (CHUNK - 1) + CHUNK)
    assert found.store().frames == (0, 1, 2, 3)


def test_noisy_writes_leave_committed_rows_alone():
    found = Recorded().run(passes(1))
    (group,) = found.store().memory.groups
    before = group.payload("k").clone(), group.payload("v").clone()
    found.run(list(passes(2))[3:5])
    assert torch.equal(group.payload("k"), before[0]) and torch.equal(group.payload("v"), before[1])


@dataclass(frozen=True)
class Late(RetainPart):
    """DeCoPrune: what is decided at one chunk takes effect two chunks later."""

    def commit(self, views, state):
        chunk = views[0].step.chunk
        state[chunk] = [view.raster == 0 for view in views]
        if chunk - 2 not in state:
            return None
        return [
            Retention(keep=newest_and(view, view.raster == 0))
            for view, _ in zip(views, state[chunk - 2], strict=True)
        ]

    def on_prediction(self, step, timestep, x0, state):
        state.setdefault("seen", []).append((step.chunk, step.step, timestep, tuple(x0.shape)))

    def on_final(self, x0, state):
        state.setdefault("final", []).append(float(x0.mean()))


def test_a_decision_takes_effect_chunks_later():
    found = Recorded(retain=Late()).run(passes(2))
    assert len(found.store().memory) == 2 * CHUNK * TOKENS
    found.run(list(passes(3))[6:])
    assert len(found.store().memory) == 2 * CHUNK + CHUNK * TOKENS


def test_predictions_and_final_latents_are_shown(panorama):
    from lightning_kv import rollout

    @dataclass(frozen=True)
    class Pose(Late):
        def commit(self, views, state):
            state.setdefault("pose", []).append(float(views[0].inputs["pose"][views[0].frames[-1]]))

    pose = torch.arange(6.0) * 10
    made = rollout(
        panorama,
        policy(retain=Pose()),
        "dusk fast n10 left",
        6,
        inputs={"pose": pose},
        decode=False,
    )
    state = made.session.samples[0].states["cond"]["retain"]
    assert [seen[:3] for seen in state["seen"][:4]] == [
        (
            0,
            i,
            t,
        )
        for i, t in enumerate((1000.0, 750.0, 500.0, 250.0))
    ]
    assert state["seen"][0][3] == (3, 16, 4, 4)
    halves = made.latents[0].split(3)
    assert state["final"] == pytest.approx([float(half.mean()) for half in halves], abs=1e-6)
    assert state["pose"] == [20.0, 50.0]


# -- samplers and events ---------------------------------------------------------------------


@dataclass(frozen=True)
class Clean(RetainPart):
    """Remembers whether the rows it is asked about were made from clean latents."""

    observes: ClassVar[tuple[str, ...]] = ("commit",)

    def observe(self, view, state):
        state.setdefault("observed", set()).add(view.clean)

    def commit(self, views, state):
        state.setdefault("clean", set()).add(views[0].clean)


def test_a_sampler_without_a_commit_pass_is_seen_as_one():
    steps = [
        replace(step, final=step.frames) for step in passes(2, noisy=1) if step.phase == "denoise"
    ]
    found = Recorded(retain=Clean()).run(steps)
    assert found.state()["clean"] == {False} == found.state()["observed"]
    assert found.store().frames == (0, 1, 2, 3)
    assert Recorded(retain=Clean()).run(passes(2)).state()["clean"] == {True}


def test_a_pass_whose_rows_are_thrown_away():
    found = Recorded().run(passes(2))
    before = [x.clone() for g in found.store().memory.groups for x in g.plain.rows.values()]
    frames = (4, 5)
    step = Pass("denoise", frames, (500.0,) * 2, 2, mode="scratch", samples=(0, 0))
    q, k, v = (torch.randn(2, 2 * TOKENS, HEADS, WIDTH) for _ in range(3))
    out = found.session.attend(0, q, k, v, step)
    assert out.shape == q.shape and not torch.equal(out[0], out[1])
    after = [x for g in found.store().memory.groups for x in g.plain.rows.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True)
class Told(SelectPart):
    """Every kind of part hears of events."""

    def event(self, event, views, state):
        state.setdefault("events", []).append((event.kind, len(views)))


@dataclass(frozen=True)
class ToldPositions(PositionsPart):
    def lags(self, view, state, selection=None):
        return view.step.query_times[0] - view.time.unsqueeze(1)

    event: ClassVar[Any] = Told.event


def test_events_reach_every_kind_of_part():
    found = Recorded(select=Told(), positions=ToldPositions()).run(passes(1))
    step = Pass("denoise", (2, 3), (500.0,) * 2, 1, opens=True)
    found.session.event(Event("scene_cut", 2), step)
    wanted = [("start", SIZES.layers), ("scene_cut", SIZES.layers)]
    assert found.state("select")["events"] == wanted == found.state("positions")["events"]


@dataclass(frozen=True)
class Closer(PositionsPart):
    """Positions that depend on what is read: the frames that are read stand side by side."""

    depends: ClassVar[bool] = True

    def lags(self, view, state, selection=None):
        frames = torch.ones(1, 1, len(view.frames), dtype=torch.bool)
        if selection is not None:
            frames = torch.tensor([[[f in selection.frames for f in view.frames]]])
        rank = frames.flip(2).cumsum(2).flip(2)
        state.setdefault("asked", []).append(selection is not None)
        return view.at_rows(rank.float())


@dataclass(frozen=True)
class First(SelectPart):
    def pick(self, view, state):
        return Selection(frames=view.frames[:1]) if view.frames else None


def test_positions_are_asked_again_where_they_depend_on_what_is_read():
    found = Recorded(select=First(), positions=Closer()).run(passes(2))
    plan = found.session.samples[0].plans["cond", 0, False]
    assert plan.lag[0, 0, :TOKENS].tolist() == [1.0] * TOKENS
    assert plan.blocks[0].time.unique().tolist() == [CHUNK - 1.0]
    assert found.state("positions")["asked"][-2:] == [False, True]


@dataclass(frozen=True)
class Contradiction(SelectPart):
    answer: Any = None

    def pick(self, view, state):
        return self.answer(view) if view.frames else None


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            lambda view: Selection(frames=view.frames, rows=torch.ones(1, 1, len(view)).bool()),
            "gave frames and rows",
        ),
        (lambda view: Selection(frames=view.frames, count=(1, 1)), "a count of 2 numbers"),
    ],
)
def test_a_selection_that_contradicts_itself_is_refused(answer, text):
    with pytest.raises(ValueError, match=f"Contradiction.*layer 0, chunk 1.*{text}"):
        Recorded(select=Contradiction(answer=answer)).run(passes(2))
