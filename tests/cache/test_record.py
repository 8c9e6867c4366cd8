"""What recorders write down, against loops over single rows and queries."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
import slow_hindsight as slow
from slow import (
    AskAtCommit,
    Scattered,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    tape,
)

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Event, Retention, Sums
from lightning_kv.cache.mass import MassRecorder, RowRecorder
from lightning_kv.cache.outputs import OutputRecorder
from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.cache.record import recorders
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.base import PositionsPart
from lightning_kv.testing import chunked

GEOMETRY, CHUNK = sessions.GEOMETRY, sessions.CHUNK
LAYERS, HEADS, TOKENS = GEOMETRY.layers, GEOMETRY.heads, GEOMETRY.tokens


class Near(PositionsPart):
    """No row is further from a query frame than a lag that differs by head and query frame."""

    def lags(self, view, state, selection=None):
        lag = torch.tensor(view.step.query_times).view(1, -1, 1) - view.time.unsqueeze(1)
        odd = torch.tensor(view.step.frames).view(1, -1, 1) % 2
        return torch.minimum(lag, 1.5 + torch.arange(HEADS).view(-1, 1, 1) + odd)


def near(frame, query, head):
    return query - min(query - frame, 1.5 + head + query % 2)


def heavier(views):
    """Rows of the second chunk count twice from then on."""
    if views[0].step.chunk != 1:
        return [None] * len(views)
    view, rows = views[0], torch.arange(CHUNK * TOKENS).unsqueeze(0)
    own = [view.field(name)[:, CHUNK * TOKENS :] for name in ("frame_id", "time", "place")]
    ones = torch.ones(rows.shape)
    sums = Sums(rows + rows.shape[1], rows, ones, *own, weight=2 * ones)
    keep = torch.arange(len(view)).unsqueeze(0) < CHUNK * TOKENS
    return [Retention(keep=keep, sums=sums)] * len(views)


def twice(frame, start):
    return 0.6931471805599453 if start > 3 and frame in (2, 3) else 0.0


def branches(steps):
    """The same passes in both branches."""
    for step in steps:
        yield from (step, replace(step, namespace="uncond"))


def shared(made):
    return replace(made, branches="shared")


CASES = {
    "the full cache, two samples": (lambda: policy(), lambda: passes(4), 2, {}),
    "a ragged one, two samples": (
        lambda: policy(retain=Scattered()),
        lambda: passes(5, noisy=1),
        2,
        {"stays": Scattered().stays},
    ),
    "keys stored raw": (lambda: policy(positions={"part": "clamp", "lag": 99}), None, 1, {}),
    "merged rows": (
        lambda: policy(retain=AskAtCommit(question=heavier), bias="log_weight"),
        None,
        1,
        {"extra": twice},
    ),
    "frames that meet rows at other times": (
        lambda: policy(positions=Near()),
        lambda: passes(4, noisy=1),
        1,
        {"time": near},
    ),
    "that, ragged": (
        lambda: policy(positions=Near(), retain=Scattered()),
        lambda: passes(4, noisy=1),
        1,
        {"time": near, "stays": Scattered().stays},
    ),
    "given frames": (lambda: policy(), lambda: slow.given(4), 1, {}),
    "several chunks in flight": (lambda: policy(), lambda: rolling(4, 3), 1, {}),
    "a short last chunk": (lambda: policy(), lambda: chunked([2, 2, 2, 1], noisy=2), 1, {}),
    "two branches": (
        lambda: policy(retain=Scattered()),
        lambda: branches(passes(3)),
        1,
        {"stays": Scattered().stays},
    ),
    "a branch that follows": (
        lambda: shared(policy(retain=Scattered())),
        lambda: branches(passes(3)),
        1,
        {"stays": Scattered().stays},
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    made, steps, batch, how = CASES[request.param]
    recorded = tape((steps or (lambda: passes(4, noisy=1)))(), batch, gain=2.0)
    spaces = len({step.namespace for step, *_ in recorded})
    clips = slow.clips(recorded, batch, geometry=replace(GEOMETRY, branches=spaces))
    return made(), recorded, clips, how


def recording(recorder, made, recorded, clips):
    """The tables of a tape that is played under a policy."""
    recorder.begin(clips)
    play(session(made, len(clips), watch=recorder), recorded)
    return [recorder.table(i) for i in range(len(clips))]


def frame_lines(found, frames):
    """What the loops found as lines over the frames."""
    lines = {where: slow.by_frame(spots) for where, spots in found.items()}
    return {w: torch.tensor([own.get(f, 0.0) for f in range(frames)]) for w, own in lines.items()}


# -- mass by frame -----------------------------------------------------------------------------


def same_mass(tables, found, clip):
    lines = frame_lines(found, clip.frames)
    for (b, namespace, chunk, layer, h), line in lines.items():
        mine = tables[b].mass[namespace][chunk, layer, h]
        torch.testing.assert_close(mine, line, atol=2e-6, rtol=0)
    count = sum(own.shape[0] * LAYERS * HEADS for t in tables for own in t.mass.values())
    assert count == len(lines), "nothing else stands in the tables"


def test_mass_by_frame_is_that_of_a_loop_over_single_queries(case):
    made, recorded, clips, how = case
    tables = recording(MassRecorder(), made, recorded, clips)
    same_mass(tables, slow.masses(recorded, **how), clips[0])
    for table in tables:
        for mass in table.mass.values():
            torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]))


@pytest.mark.parametrize("queries", [2, 3, 7])
def test_some_queries_stand_for_all(queries):
    recorded = tape(passes(3), gain=2.0)
    clips = slow.clips(recorded)
    tables = recording(MassRecorder(queries), policy(retain=Scattered()), recorded, clips)
    how = {"stays": Scattered().stays}
    same_mass(tables, slow.masses(recorded, queries, **how), clips[0])
    every = slow.masses(recorded, **how)
    with pytest.raises(AssertionError):
        same_mass(tables, every, clips[0])


def test_where_frames_meet_rows_at_other_times_all_queries_are_asked():
    recorded = tape(passes(3))
    clips = slow.clips(recorded)
    tables = recording(MassRecorder(3), policy(positions=Near()), recorded, clips)
    same_mass(tables, slow.masses(recorded, time=near), clips[0])


# -- mass by row -------------------------------------------------------------------------------


def test_mass_by_row_is_that_of_the_same_loop(case, tmp_path):
    made, recorded, clips, how = case
    chunks = (1, clips[0].chunks - 1)
    tables = recording(RowRecorder(chunks, tmp_path / "rows"), made, recorded, clips)
    frames = recording(MassRecorder(), made, recorded, clips)
    found = slow.masses(recorded, **how)
    for (b, namespace, chunk, layer, h), spots in found.items():
        if chunk not in chunks:
            continue
        line = torch.zeros(clips[0].frames, TOKENS)
        for spot, share in spots.items():
            line[spot] = share
        mine = tables[b].mass(chunk, namespace)[layer, h]
        torch.testing.assert_close(mine, line, atol=2e-6, rtol=0)
        whole = frames[b].mass[namespace][chunk, layer, h]
        torch.testing.assert_close(mine.sum(-1), whole, atol=2e-6, rtol=0)


def rows_of(folder, seed=0, chunks=(1,), batch=1):
    recorded = tape(passes(3, noisy=1), batch, seed=seed)
    clips = [replace(clip, seed=10 * seed + clip.seed) for clip in slow.clips(recorded, batch)]
    return recording(RowRecorder(chunks, folder), policy(), recorded, clips)


def test_another_rollout_into_the_same_folder_leaves_a_table_alone(tmp_path):
    """Other batches and other ranks write there too."""
    (first,) = rows_of(tmp_path, seed=1)
    before = first.mass(1).clone()
    rows_of(tmp_path, seed=2)
    assert torch.equal(first.mass(1), before)


def test_two_samples_of_one_key_have_files_of_their_own(tmp_path):
    recorded = tape(passes(3, noisy=1), batch=2)
    clips = [replace(clip, key="k", seed=5) for clip in slow.clips(recorded, 2)]
    tables = recording(RowRecorder([1], tmp_path), policy(), recorded, clips)
    for table in tables:
        total = table.mass(1).sum((-1, -2))
        torch.testing.assert_close(total, torch.ones(LAYERS, HEADS))
    assert not torch.equal(*(table.mass(1) for table in tables))


def test_what_is_read_may_be_changed_without_changing_the_table(tmp_path):
    (table,) = rows_of(tmp_path)
    before = table.mass(1).clone()
    table.mass(1).zero_()
    assert torch.equal(table.mass(1), before)


def test_mass_by_row_that_is_not_there_is_refused(tmp_path):
    (table,) = rows_of(tmp_path, chunks=(0, 2))
    with pytest.raises(ValueError, match=r"chunk 1 \(cond\) was not.* that were: 0, 2\. Name it"):
        table.mass(1)
    with pytest.raises(ValueError, match=r"chunk 0 \(uncond\) was not.* that were: none\. Name"):
        table.mass(0, "uncond")
    table.files["cond", 2].unlink()
    with pytest.raises(ValueError, match=r"chunk 2 \(cond\) is gone: .* removed\. Record it again"):
        table.mass(2)
    assert not table.files["cond", 2].exists(), "nothing made it anew"


@pytest.mark.parametrize("chunks", [(3,), (0, -1, 9)])
def test_chunks_that_the_rollout_does_not_have_are_refused(chunks, tmp_path):
    wrong = [c for c in chunks if c]
    text = rf"asked of chunks \[{', '.join(map(str, wrong))}\], and the rollout has 3.*Name some"
    with pytest.raises(ValueError, match=text):
        rows_of(tmp_path / "new", chunks=chunks)
    assert not (tmp_path / "new").exists()


# -- sizes -------------------------------------------------------------------------------------


def test_tables_take_the_bytes_that_were_said(case, tmp_path):
    made, recorded, clips, _ = case
    recorder = MassRecorder()
    for table in recording(recorder, made, recorded, clips):
        assert sum(x.nbytes for x in table.mass.values()) == recorder.size(clips[0])
    recorder = RowRecorder((0, 2), tmp_path)
    for table in recording(recorder, made, recorded, clips):
        assert sum(p.stat().st_size for p in table.files.values()) == recorder.size(clips[0])


def nbytes(table):
    return sum(
        x.nbytes for own in table.outputs.values() for x in (own.share, own.pull, own.weight)
    )


@pytest.mark.parametrize("queries", [1, 3, 50])
def test_outputs_take_no_more_bytes_than_were_said(case, queries):
    made, recorded, clips, _ = case
    widest = max(len(step.frames) for step, *_ in recorded)
    for known in ({}, {"chunk": CHUNK, "flight": widest}):
        geometry = replace(clips[0].geometry, **known)
        own = [replace(clip, geometry=geometry) for clip in clips]
        recorder = OutputRecorder(queries)
        for table in recording(recorder, made, recorded, own):
            assert nbytes(table) <= recorder.size(own[0])


@pytest.mark.parametrize("steps", [lambda: passes(4), lambda: chunked([2, 2, 2, 1], noisy=2)])
def test_outputs_of_a_plain_rollout_take_all_of_them(steps):
    recorded = tape(steps())
    clips = slow.clips(recorded, geometry=replace(GEOMETRY, chunk=CHUNK, flight=CHUNK))
    recorder = OutputRecorder(2)
    (table,) = recording(recorder, policy(), recorded, clips)
    assert nbytes(table) == recorder.size(clips[0])


RECORDERS = {
    "mass": lambda folder, **own: MassRecorder(**own),
    "rows": lambda folder, **own: RowRecorder([0], folder / "rows", **own),
    "outputs": lambda folder, **own: OutputRecorder(**own),
}


@pytest.mark.parametrize("name", RECORDERS)
def test_a_table_above_its_limit_is_refused(name, tmp_path):
    clips = slow.clips(tape(passes(3)))
    size = RECORDERS[name](tmp_path).size(clips[0])
    RECORDERS[name](tmp_path, limit=size).begin(clips)
    assert not list(tmp_path.iterdir()), "nothing is made before there is something to write"
    text = rf"'{name}' takes {size:,} bytes per clip, and its limit is {size - 1:,}\. Record less"
    with pytest.raises(ValueError, match=text):
        RECORDERS[name](tmp_path / "not", limit=size - 1).begin(clips)
    assert not (tmp_path / "not").exists()


# -- outputs by frame --------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3])
def test_outputs_over_any_frames_are_those_of_a_masked_softmax(case, queries):
    """In float64 by the loop; the table is float32, and values and outputs are of the order 1."""
    made, recorded, clips, how = case
    tables = recording(OutputRecorder(queries), made, recorded, clips)
    found = slow.outputs(recorded, queries, clips[0].passes, **how)
    rng, checked = torch.Generator().manual_seed(0), 0
    for (b, namespace, chunk, layer, h), asked in found.items():
        own = tables[b].outputs[namespace, chunk, layer]
        assert own.weight.tolist() == [query.weight for query in asked]
        share, pull = own.share[h].double(), own.pull[h].double()
        torch.testing.assert_close(share.sum(-1).float(), torch.ones(len(asked)))
        torch.testing.assert_close(pull.sum(1), torch.zeros_like(pull[:, 0]), atol=2e-6, rtol=0)
        for e, query in enumerate(asked):
            every = sorted(set(query.frames.tolist()))
            assert set(every) <= set(own.frames)
            some = [f for f in every if torch.rand((), generator=rng) < 0.5] or every[-1:]
            place = [own.frames.index(f) for f in some]
            mine = query.over() + (pull[e, place].sum(0) / share[e, place].sum()).numpy()
            assert mine == pytest.approx(query.over(some), rel=2e-5, abs=2e-5)
            checked += len(some) < len(every)
    assert checked > 20


def test_frames_that_were_in_flight_in_some_passes_only_have_no_share_in_the_others():
    recorded = tape(rolling(4, 3))
    clips = slow.clips(recorded)
    (table,) = recording(OutputRecorder(2), policy(), recorded, clips)
    own = table.outputs["cond", 1, 0]
    assert own.frames == tuple(range(8)) and own.share.shape[1] == 4
    assert own.weight.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert (own.share[:, :2] > 0).all()
    assert (own.share[:, 2:, :4] > 0).all() and not own.share[:, 2:, 4:].any()


@pytest.mark.parametrize(("noisy", "queries"), [(1, 2), (3, 2), (3, 4), (2, 99)])
def test_passes_of_a_chunk_ask_other_queries(noisy, queries):
    """As far as there are as many: the shares of no two of them are alike."""
    recorded = tape(passes(3, noisy=noisy))
    same = {}
    for i, (step, layer, *qkv) in enumerate(recorded):  # the same queries and keys in every pass
        recorded[i] = (step, layer, *same.setdefault((step.chunk, layer), qkv))
    clips = slow.clips(recorded)
    (table,) = recording(OutputRecorder(queries), policy(), recorded, clips)
    share = table.outputs["cond", 2, 1].share[0]
    different = len({tuple(line) for line in share.mul(1e5).round().tolist()})
    assert different == min(queries * (noisy + 1), CHUNK * TOKENS)


# -- words -------------------------------------------------------------------------------------


def test_names_and_settings_of_tables():
    assert [type(one) for one in recorders("mass")] == [MassRecorder]
    assert [one.queries for one in recorders(["mass", "outputs"])] == [520, 4]
    assert [one.queries for one in recorders({"outputs": {"queries": 9}})] == [9]
    with pytest.raises(ValueError, match=r"'heat' can be.* asked for with \{\}\. Tables: mass, ro"):
        recorders(["heat"])
    with pytest.raises(
        ValueError, match=r"'mass' cannot be recorded with \{'rows': 1\}.* See Mass"
    ):
        recorders({"mass": {"rows": 1}})
    with pytest.raises(ValueError, match=r"'rows' cannot be recorded with \{\}.*See RowRecorder"):
        recorders(["rows"])


@pytest.mark.parametrize("name", RECORDERS)
def test_no_queries_leave_nothing_to_write(name, tmp_path):
    with pytest.raises(ValueError, match=rf"'{name}' was asked.*queries=0.*Give 1 or more"):
        RECORDERS[name](tmp_path, queries=0)


# -- whole rollouts ----------------------------------------------------------------------------

TINY = WanConfig(
    dim=24,
    ffn_dim=48,
    layers=2,
    heads=2,
    channels=3,
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    chunk=2,
    train_horizon=12,
    timesteps=(1000.0, 500.0),
)
SAMPLERS = {
    "few steps, a short last chunk": {"short_last": True},
    "more steps in the first chunk": {"first_timesteps": (1000.0, 750.0, 500.0, 250.0)},
    "several chunks in flight": {"sampler": "rolling", "timesteps": (1000.0, 700.0, 300.0)},
    "guidance": {"sampler": "flow", "timesteps": (900.0, 500.0), "guidance": 3.0},
}


def tiny(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = CausalWan(replace(TINY, **changes)).eval().requires_grad_(False)
    return VideoModel(network, None, lambda prompts: torch.ones(len(prompts), 3, 10))


def frames_of(config, frames=9):
    return frames if config.short_last else frames - 1


class Spy:
    """Full attention's mass by frame, from all rows that it has seen become final."""

    def __init__(self):
        self.past, self.total, self.weight = {}, {}, {}

    def __call__(self, view):
        step, tokens = view.step, view.geometry.tokens
        place = (view.sample, step.namespace, view.layer)
        keys, ids = self.past.get(place, (view.own_keys()[:, :0].double(), []))
        flight = [f for f in step.frames for _ in range(tokens)]
        both = torch.cat([keys, view.own_keys().double()], 1)
        logits = view.query.double() @ both.transpose(1, 2) / view.query.shape[-1] ** 0.5
        mass = logits.softmax(-1).mean(1)
        weight = 0.5 if step.phase == "commit" else 1.0
        where = (*place, step.chunk)
        self.weight[where] = self.weight.get(where, 0.0) + weight
        total = self.total.setdefault(where, {})
        frames = torch.tensor(ids + flight)
        for frame in set(ids + flight):
            own = weight * mass[:, frames == frame].sum(-1)
            total[frame] = total.get(frame, 0.0) + own
        if step.final:
            kept = view.own_keys()[:, view.final].double().clone()
            own = [f for f in flight if f in step.final]
            self.past[place] = (torch.cat([keys, kept], 1), ids + own)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_of_rollouts_are_full_attention_by_chunk_and_sample(name, context):
    model, spy = tiny(**SAMPLERS[name]), Spy()
    frames = frames_of(model.network.config)
    start = torch.randn(2, context, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    made = rollout(
        model,
        preset("full"),
        ["one", "two"],
        frames,
        context=start if context else None,
        record="mass",
        watch=spy,
        decode=False,
    )
    for (sample, namespace, layer, chunk), total in spy.total.items():
        line = made.tables["mass"][sample].mass[namespace][chunk, layer]
        for frame, own in total.items():
            theirs = own / spy.weight[sample, namespace, layer, chunk]
            torch.testing.assert_close(line[:, frame].double(), theirs, atol=1e-5, rtol=0)
        assert line.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    clip = made.tables["mass"][1].clip
    assert (clip.key, clip.prompt, clip.frames, clip.context) == ("two", "two", frames, context)
    chunks = {chunk for *_, chunk in spy.total}
    assert chunks == set(range(clip.chunks)), "each chunk is the next to become final once"


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_recording_changes_nothing(name, context, tmp_path):
    """Latents, rows read and scored, and peak bytes; and sizes hold in real rollouts too."""
    model = tiny(**SAMPLERS[name])
    frames = frames_of(model.network.config)
    start = torch.randn(2, context, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    options = {"context": start if context else None, "decode": False}
    wanted = {"mass": {}, "rows": {"chunks": [2], "folder": tmp_path}, "outputs": {"queries": 2}}
    for spec in ("full", "h2o@4f", "top-attention@3f"):
        plain, watched = (
            rollout(model, preset(spec), ["one", "two"], frames, record=record, **options)
            for record in ((), wanted)
        )
        assert plain.tables == {}
        assert torch.equal(plain.latents, watched.latents)
        assert plain.costs == watched.costs
        for recorder in recorders(wanted):
            own = watched.tables[recorder.name][1]
            made = {
                "mass": lambda own: sum(x.nbytes for x in own.mass.values()),
                "rows": lambda own: sum(p.stat().st_size for p in own.files.values()),
                "outputs": nbytes,
            }[recorder.name](own)
            said = recorder.size(own.clip)
            assert made == said if recorder.name != "outputs" else made <= said


def test_a_rebuild_is_not_written_down():
    """Past frames that are encoded again at a switch are no queries of the chunk."""
    model, switch = tiny(), [Event("prompt_switch", 4, "other")]
    found, weights = {}, {}

    def watch(view):
        step, tokens = view.step, view.geometry.tokens
        if step.rebuild:
            return
        weight = 0.5 if step.phase == "commit" else 1.0
        mass = view.logits(view.query).softmax(-1).mean(1)
        ids = [*view.frame_id[0].tolist(), *(f for f in step.frames for _ in range(tokens))]
        line = found.setdefault((step.chunk, view.layer), torch.zeros(view.heads, 8))
        line.index_add_(1, torch.tensor(ids), weight * mass)
        weights[step.chunk] = weights.get(step.chunk, 0.0) + weight / 2  # both layers

    again = policy(retain={"part": "window", "budget": "4f", "switch": "recache"})
    about = {"events": switch, "record": "mass", "watch": watch, "decode": False}
    made = rollout(model, again, "one", 8, **about)
    assert made.rebuilds
    table = made.tables["mass"][0]
    for (chunk, layer), line in found.items():
        mine = table.mass[CONDITIONAL][chunk, layer]
        torch.testing.assert_close(mine, line / weights[chunk], atol=1e-5, rtol=0)
    assert table.clip.events == tuple(switch)


def test_a_session_of_its_own_would_not_hear_of_a_recorder():
    model = tiny()
    own = CacheSession(model.network.geometry(), preset("full"))
    for extra in ({"record": "mass"}, {"tables": {"x": [1]}}, {"watch": print}):
        with pytest.raises(ValueError, match=r"A session of its own.*Give them to CacheSession"):
            rollout(model, preset("full"), "one", 4, session=own, decode=False, **extra)
