"""The oracle: its scores and choices against loops that compute every output anew."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import slow_hindsight as slow
from slow import (
    AskAtCommit,
    field,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    stores,
    tape,
    turn,
    world,
)

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Event, Retention
from lightning_kv.cache.record import recorders
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.hindsight import Place, coming_mass, greedy_gains, greedy_order
from lightning_kv.policies.registry import build_part, policy_from_dict, presets
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.select.oracle_reads import OracleReads
from lightning_kv.tasks.rollouts.policies import needs_of
from lightning_kv.testing import chunked


def tables_of(recorded, made=None, batch=1, queries=4, geometry=None):
    """Tables of mass and of outputs, by name, one per sample."""
    clips = slow.clips(recorded, batch, geometry=geometry or sessions.GEOMETRY)
    watching = recorders({"mass": {}, "outputs": {"queries": queries}})
    for recorder in watching:
        recorder.begin(clips)

    def watch(view):
        for recorder in watching:
            recorder(view)

    play(session(made or policy(), batch, watch=watch), recorded)
    return {own.name: [own.table(i) for i in range(batch)] for own in watching}


def most_passes(recorded):
    return slow.clips(recorded)[0].passes


def chunks_of(recorded):
    return slow.clips(recorded)[0].chunks


# -- what it ranks by --------------------------------------------------------------------------


def stays(frame, head, layer):
    """Frames that each head holds in the tests of scores: others in each, with gaps."""
    return (frame * 37 + head * 11 + layer * 5) % 7 > 1


def at_commits(recorded, tables, look, whole=False):
    """Show the views of every commit but the last to a function; heads hold other frames each."""
    last = chunks_of(recorded) - 1

    def question(views):
        if views[0].step.chunk < last:
            for view in views:
                look(view)
        if whole:
            return None
        found = []
        for view in views:
            own = [
                [f >= view.step.final[0] or stays(f, h, view.layer) for f in view.frames]
                for h in range(view.heads)
            ]
            found.append(Retention(keep=view.rows_of(torch.tensor(own))))
        return found

    batch = len(tables["mass"])
    on = session(policy(retain=AskAtCommit(question=question)), batch, tables=tables)
    play(on, recorded)


def held_by(view, head):
    """Frames of a head by the rule above: the newest chunk, and what stayed at earlier commits."""
    before, every = view.step.start - sessions.CHUNK, range(view.step.final[-1] + 1)
    return [f for f in every if f >= before or stays(f, head, view.layer)]


@pytest.mark.parametrize("discount", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_mass_to_come_is_that_of_a_loop(discount, ahead):
    recorded, checked = tape(passes(5, noisy=1), 2, gain=2.0), 0
    found, tables = slow.masses(recorded), tables_of(recorded, batch=2)

    def look(view):
        nonlocal checked
        chunks = range(view.step.chunk + 1, min(chunks_of(recorded), view.step.chunk + 1 + ahead))
        mine = coming_mass(view.tables["mass"], Place.of(view), chunks, discount)
        assert mine.shape == (view.heads, 1, len(view.frames))
        for h in range(view.heads):
            where = (view.sample, "cond", view.layer, h)
            theirs = slow.mass_to_come(found, where, chunks, discount)
            line = [theirs[f] for f in view.frames]
            assert mine[h, 0].tolist() == pytest.approx(line, abs=5e-6)
            checked += 1

    at_commits(recorded, tables, look)
    assert checked == 4 * 2 * sessions.GEOMETRY.layers * sessions.GEOMETRY.heads


WORLDS = {
    "chunks of two": ((2, 2), 2, {}, lambda: passes(5, noisy=1)),
    "frame by frame": ((1, 3), 1, {"heads": 2}, lambda: chunked([1] * 7)),
    "chunks of three": ((1, 2), 3, {"layers": 1, "heads": 4}, lambda: chunked([3] * 4, 1)),
    "several in flight": ((2, 2), 2, {}, lambda: rolling(4, 2)),
    "given frames, in one pass": ((2, 2), 2, {}, lambda: slow.given(6, 4)),
    "a short last chunk": ((2, 1), 3, {}, lambda: chunked([3, 3, 3, 1], noisy=2)),
}


def test_the_greedy_order_is_that_of_outputs_computed_anew(monkeypatch):
    """Every head holds other frames, with gaps; guards, steps, discounts and horizons differ."""
    decisions, ragged = 0, 0
    for seed, name in enumerate([*WORLDS, *WORLDS]):
        grid, chunk, other, steps = WORLDS[name]
        with monkeypatch.context() as patch:
            world(patch, grid, chunk)
            patch.setattr(sessions, "GEOMETRY", replace(sessions.GEOMETRY, **other))
            recorded = tape(steps(), seed=seed, gain=2.0, loud=0.5)
            queries = 1 + seed % 3
            found = slow.outputs(recorded, queries, most_passes(recorded))
            tables = tables_of(recorded, queries=queries)
            discount, ahead, most = ((1.0, 9, 99), (0.7, 2, 3), (0.5, 9, 99))[seed % 3]

            def look(view, discount=discount, ahead=ahead, most=most, found=found, name=name):
                nonlocal decisions, ragged
                end = max(where[2] for where in found) + 1
                chunks = range(view.step.chunk + 1, min(end, view.step.chunk + 1 + ahead))
                made = view.step.final[-1] + 1
                guard = [[f in (0, made - 1) for f in view.frames]]
                table, place = view.tables["outputs"], Place.of(view)
                about = (table, place, chunks, discount, torch.tensor(guard), most)
                order = greedy_order(*about)
                again, gains = greedy_gains(*about)
                assert torch.equal(order, again)
                for h in range(view.heads):
                    seen = [found[0, "cond", c, view.layer, h] for c in chunks]
                    own = held_by(view, h)
                    ragged += len(own) < len(view.frames)
                    kept = {f for f in (0, made - 1) if f in own}
                    theirs = slow.greedy(own, kept, seen, made, discount, most)
                    line = order[h, 0].tolist()
                    mine = {-rank: f for f, rank in zip(view.frames, line, strict=True)}
                    mine = [mine[i] for i in range(len(theirs))]
                    assert mine == theirs, (name, view.step.chunk, view.layer, h)
                    rest = [
                        rank for f, rank in zip(view.frames, line, strict=True) if f not in theirs
                    ]
                    assert all(rank < -len(view.frames) for rank in rest)
                    assert rest == sorted(rest), "of the others the newer first"
                    sets = [kept | {*mine[:i]} for i in range(len(mine) + 1)]
                    losses = [slow.loss_of(one, seen, made, discount) for one in sets]
                    expected = dict.fromkeys(view.frames, 0.0)
                    for f, before, after in zip(mine, losses, losses[1:], strict=False):
                        expected[f] = (before - after) / losses[0]
                    assert gains[h, 0].tolist() == pytest.approx([*expected.values()], abs=1e-5)
                    decisions += len(theirs)

            at_commits(recorded, tables, look)
    assert ragged > 60
    assert decisions >= 500


def test_a_query_that_is_left_with_nothing_wants_what_it_saw(monkeypatch):
    """Every share but one underflows: outputs of sets without that frame are no numbers."""
    recorded = made_up(monkeypatch, [0.0, 400.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    orders = []

    def look(view):
        if view.step.chunk == 3:
            guard = torch.tensor([[False, False, False, True]])
            table, place = view.tables["outputs"], Place.of(view)
            orders.append(greedy_order(table, place, [4], 1.0, guard, 3)[0, 0].tolist())

    at_commits(recorded, tables_of(recorded), look, whole=True)
    for ranks in orders:
        assert ranks[1] == 0.0 and ranks[3] < -4
        assert sorted(ranks[:3]) == [-2.0, -1.0, 0.0]


def made_up(monkeypatch, logits, values):
    """Frames of one token and chunk each: the last one's queries meet these logits everywhere.

    Frame i has the value ``values[i]`` in a direction of its own, unless it is a pair.
    """
    world(monkeypatch, (1, 1), 1)
    recorded, unit = [], torch.ones(12, dtype=torch.float64) / 12**0.5
    for step in chunked([1] * len(logits), 1):
        frame = step.start
        value = torch.zeros(12)
        place, size = values[frame] if isinstance(values[frame], tuple) else (frame, values[frame])
        value[place] = size
        query, key = (turn(x * unit, frame, 0, sign=-1) for x in (12**0.5, logits[frame]))
        shape = (1, 1, sessions.GEOMETRY.heads, 12)
        qkv = (x.float().expand(shape).clone() for x in (query, key, value))
        q, k, v = qkv
        recorded += [(step, layer, q, k, v) for layer in range(sessions.GEOMETRY.layers)]
    return recorded


@pytest.mark.parametrize(
    ("objective", "kept"), [("mass", [0, 1, 3]), ("output", [0, 2, 3])], ids=["mass", "output"]
)
def test_of_two_frames_that_say_the_same_outputs_want_one_and_mass_wants_both(
    monkeypatch, objective, kept
):
    """Shares of the last query: 0.3 on each of two frames that are alike, 0.2 on another, 0.2 on
    its own and next to nothing on the newest, which is protected. With one of the two and the
    other frame the output is nearer than with both, whose weight the one takes over.
    """
    logits = torch.tensor([0.3, 0.3, 0.2, 1e-6, 0.2]).log().tolist()
    recorded = made_up(monkeypatch, logits, [(0, 1.0), (0, 1.0), 5.0, 0.0, 0.0])
    part = {"part": "oracle", "objective": objective, "budget": "3f"}
    on = session(policy(retain=part), tables=tables_of(recorded))
    play(on, recorded[: -2 * sessions.GEOMETRY.layers])
    for store in stores(on):
        for h in range(sessions.GEOMETRY.heads):
            assert field(store, "frame_id", h).tolist() == kept


# -- what it keeps and reads -------------------------------------------------------------------

SHARES = [[1.0, 0.75, 1.5], [1.25, 1.0, 0.75]]
RULES = {
    "defaults": {},
    "mass": {"objective": "mass"},
    "a sink": {"sink": 1, "discount": 0.5},
    "the next chunk alone": {"horizon": 1, "objective": "mass"},
    "two chunks, one query": {"horizon": 2, "queries": 1},
    "another number for each head": {"budget": {"part": "table", "amount": "4f", "shares": SHARES}},
    "that, by mass": {
        "budget": {"part": "table", "amount": "4f", "shares": SHARES},
        "objective": "mass",
        "sink": 1,
        "discount": 1.0,
    },
}
TAPES = {
    "chunk by chunk": lambda: passes(6, noisy=1),
    "several in flight": lambda: rolling(5, 2),
    "given frames, in one pass": lambda: slow.given(7, 5),
    "a short last chunk": lambda: chunked([2, 2, 2, 2, 1], noisy=2),
}


def slow_oracle(rule, recorded):
    """Frames held after each commit, by (chunk, layer, head)."""
    rule = {"objective": "output", "discount": 0.8, "horizon": None, "queries": 4, "sink": 0} | rule
    by_mass = rule["objective"] == "mass"
    found = (
        slow.masses(recorded)
        if by_mass
        else slow.outputs(recorded, rule["queries"], most_passes(recorded))
    )
    end, held, after = chunks_of(recorded), {}, {}
    for step in dict.fromkeys(step for step, *_ in recorded if step.final):
        stop = end if rule["horizon"] is None else min(end, step.chunk + 1 + rule["horizon"])
        chunks, made = range(step.chunk + 1, stop), step.final[-1] + 1
        for layer in range(sessions.GEOMETRY.layers):
            for h in range(sessions.GEOMETRY.heads):
                share = SHARES[layer][h] if isinstance(rule["budget"], dict) else 1.0
                room, own = round(4 * share), held.setdefault((layer, h), [])
                own += step.final
                guard = [f for f in own if f < rule["sink"] or f in step.final]
                if len(own) > room:
                    more = room - len(guard)
                    if not chunks:
                        wanted = sorted(set(own) - set(guard), reverse=True)
                    elif by_mass:
                        come = slow.mass_to_come(
                            found, (0, "cond", layer, h), chunks, rule["discount"]
                        )
                        wanted = sorted(set(own) - set(guard), key=lambda f: -come[f])
                    else:
                        seen = [found[0, "cond", c, layer, h] for c in chunks]
                        wanted = slow.greedy(own, guard, seen, made, rule["discount"], more)
                    own[:] = sorted([*guard, *wanted[:more]])
                after[step.chunk, layer, h] = list(own)
    return after


@pytest.mark.parametrize("steps", TAPES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.thinned(3)
def test_it_keeps_what_a_slow_oracle_keeps(name, steps):
    rule = {"budget": "4f"} | RULES[name]
    recorded = tape(TAPES[steps](), seed=3, gain=2.0, loud=0.5)
    expected = slow_oracle(rule, recorded)
    part = build_part("retain", {"part": "oracle", **rule})
    tables = tables_of(recorded, queries=part.queries)
    on, checked = session(policy(retain=part), tables=tables), []

    def check(step):  # told before the session closes the pass: what the last commit left
        if step.chunk > 0 and step.opens:
            compare(step.chunk - 1)

    def compare(chunk):
        for layer, store in enumerate(stores(on)):
            for h in range(sessions.GEOMETRY.heads):
                frames = list(dict.fromkeys(field(store, "frame_id", h).tolist()))
                assert frames == expected[chunk, layer, h], (chunk, layer, h)
                checked.append(chunk)

    play(on, recorded, check)
    compare(chunks_of(recorded) - 1)
    assert set(checked) == set(range(chunks_of(recorded)))


@pytest.mark.parametrize("objective", ["mass", "output"])
def test_reads_are_those_of_a_slow_oracle(objective):
    """Of each chunk the frames that its own queries want; nothing else is sure of a place."""
    recorded, seen = tape(passes(5, noisy=1), seed=5, gain=2.0), 0
    tables = tables_of(recorded, queries=2)
    mass, found = slow.masses(recorded), slow.outputs(recorded, 2, most_passes(recorded))

    def watch(view):
        nonlocal seen
        if view.selection is None:
            assert len(view.frames) <= 3
            return
        chunk, frames = view.step.chunk, list(view.frames)
        for h in range(view.heads):
            if objective == "mass":
                come = slow.by_frame(mass[0, "cond", chunk, view.layer, h])
                wanted = sorted(frames, key=lambda f: -come[f])[:3]
            else:
                own = [found[0, "cond", chunk, view.layer, h]]
                wanted = slow.greedy(frames, [], own, view.step.start, 1.0, 3)
            read = view.selection.frames[h, 0].tolist()
            assert [f for f, yes in zip(frames, read, strict=True) if yes] == sorted(wanted)
            seen += 1

    part = {"part": "oracle-reads", "objective": objective, "queries": 2, "budget": "3f"}
    play(session(policy(select=part), tables=tables, watch=watch), recorded)
    assert seen == 3 * 2 * sessions.GEOMETRY.layers * sessions.GEOMETRY.heads


def test_reads_of_a_memory_that_has_dropped_its_newest_frames():
    """What is gone is not taken as read, though it is newer than all that is held."""
    recorded, seen = tape(passes(4, noisy=1), seed=1, gain=2.0), 0
    found = slow.outputs(recorded, 4, most_passes(recorded))

    def question(views):
        if views[0].step.chunk != 2:
            return None
        return [Retention(keep=view.rows_from(range(4))) for view in views]

    def watch(view):
        nonlocal seen
        if view.step.chunk != 3:
            return
        assert view.frames == (0, 1, 2, 3)
        for h in range(view.heads):
            own = [found[0, "cond", 3, view.layer, h]]
            wanted = slow.greedy([0, 1, 2, 3], [], own, view.step.start, 1.0, 2)
            assert view.selection.frames[h, 0].nonzero().flatten().tolist() == sorted(wanted)
            seen += 1

    made = policy(
        retain=AskAtCommit(question=question), select={"part": "oracle-reads", "budget": "2f"}
    )
    play(session(made, tables=tables_of(recorded), watch=watch), recorded)
    assert seen == 2 * sessions.GEOMETRY.layers * sessions.GEOMETRY.heads


def test_frames_that_the_reference_had_dropped_are_no_candidates():
    recorded = tape(passes(5, noisy=1))
    tables = tables_of(recorded, policy(retain={"part": "window", "budget": "2f"}))
    made = policy(retain={"part": "oracle", "budget": "4f"})
    text = r"'outputs' knows nothing of the frames \[0, 1, 2, 3\].* had dropped.* Record it under"
    with pytest.raises(ValueError, match=text):
        play(session(made, tables=tables), recorded)


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
FRAMES = 12
SAMPLERS = {
    "few steps": {},
    "several chunks in flight": {"sampler": "rolling", "timesteps": (1000.0, 700.0, 300.0)},
    "guidance": {"sampler": "flow", "timesteps": (900.0, 500.0), "guidance": 3.0},
}


def encoder(prompts):
    """Text states by the letters of a prompt."""
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)) + 1)
        rows.append(10 * torch.randn(3, 10, generator=rng))
    return torch.stack(rows)


def tiny(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = CausalWan(replace(TINY, **changes)).eval().requires_grad_(False)
        for block in network.blocks:
            block.modulation *= 3
    return VideoModel(network, None, encoder)


def roll(model, made, prompts="one", **options):
    options = {"frames": FRAMES, "decode": False} | options
    return rollout(model, made, prompts, **options)


BOUNDS = sorted(name for name in presets() if preset(name).needs)


def test_presets_that_need_tables():
    assert BOUNDS == ["oracle", "oracle-mass", "oracle-reads"]
    assert preset("oracle").needs == {"outputs": {"queries": 4}}
    assert preset("oracle-mass").needs == {"mass": {}}
    assert preset("oracle-reads").needs == {"outputs": {"queries": 4}}


@pytest.mark.parametrize("branches", ["each", "shared"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_budget_for_everything_is_the_full_cache(name, sampler, branches):
    model = tiny(**SAMPLERS[sampler])
    made = replace(preset(f"{name}@{FRAMES - 2}f"), branches=branches)
    full = roll(model, preset("full"), ["one", "two"], record=made.needs)
    again = roll(model, made, ["one", "two"], tables=full.tables)
    assert torch.equal(again.latents, full.latents)
    assert again.costs[0].rows_read == full.costs[0].rows_read


@pytest.mark.parametrize("branches", ["each", "shared"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.thinned(5)
def test_samples_of_a_batch_use_their_own_tables(name, sampler, branches):
    model, made = tiny(**SAMPLERS[sampler]), replace(preset(f"{name}@4f"), branches=branches)
    both = roll(model, preset("full"), ["one", "two"], record=made.needs)
    together = roll(model, made, ["one", "two"], tables=both.tables)
    assert not torch.equal(together.latents, both.latents), "it does drop or leave something"
    for i, prompt in enumerate(("one", "two")):
        alone = roll(model, preset("full"), prompt, record=made.needs)
        apart = roll(model, made, prompt, tables=alone.tables)
        torch.testing.assert_close(together.latents[i], apart.latents[0], atol=1e-4, rtol=0)
        assert together.costs[i].rows_read == apart.costs[0].rows_read


def test_given_frames_and_a_switch_on_the_way():
    model, made = tiny(), preset("oracle@4f")
    context = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    about = {"context": context, "events": [Event("prompt_switch", 8, "other")]}
    full = roll(model, preset("full"), record=made.needs, **about)
    held = []

    def watch(view):
        held.append(len(view.frames) if view.step.opens else 0)

    roll(model, made, tables=full.tables, watch=watch, **about)
    assert max(held) <= 2 * 4  # two heads, of which each holds four frames


# -- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_full():
    return roll(tiny(), preset("full"), record=["mass", "outputs"])


WRONG = {
    "key": ({"keys": ["k"]}, "another sample: it was recorded for 'one', and .* has 'k'"),
    "seed": ({"seed": 1}, r"another seed: it was recorded for \d+, and .* has \d+"),
    "frames": ({"frames": 10}, "another length: it was recorded for 12, and .* has 10"),
    "prompt": (
        {"prompts": "two", "keys": ["one"]},
        "another prompt: it was recorded for 'one', and .* has 'two'",
    ),
    "context": (
        {"context": torch.zeros(1, 2, 3, 4, 6)},
        "another number of given frames: it was recorded for 0, and .* has 2",
    ),
    "events": (
        {"events": [Event("scene_cut", 4)]},
        r"another list of events: it was recorded for \(\), and .* has \(Event\(",
    ),
    "samples": ({"prompts": ["one", "one"]}, "1 tables 'outputs' were given for 2 samples. Give"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_table_of_another_rollout_is_refused(recorded_full, what):
    changes, text = WRONG[what]
    about = {"tables": recorded_full.tables | {"mass": recorded_full.tables["mass"]}} | changes
    if what == "samples":
        about["tables"] = {"outputs": recorded_full.tables["outputs"]}
    with pytest.raises(ValueError, match=text) as error:
        roll(tiny(), preset("oracle@4f"), **about)
    if what != "samples":
        assert str(error.value).endswith(
            "Record it in the reference rollout of this very sample: rollout(..., "
            "record=policy.needs)."
        )


def test_a_table_of_another_model_is_refused(recorded_full):
    with pytest.raises(ValueError, match=r"another model: it was.*heads=2.*has Geometry.*heads=4"):
        roll(tiny(heads=4), preset("oracle@4f"), tables=recorded_full.tables)


def test_a_table_of_the_same_chunks_but_other_frames_is_refused(recorded_full):
    model = tiny(short_last=True)
    made = roll(model, preset("full"), frames=11, record="mass")
    with pytest.raises(ValueError, match=r"another length: it was recorded for 11, and .* has 12"):
        roll(model, preset("oracle-mass@4f"), tables=made.tables)


def test_what_is_no_such_table_is_refused(recorded_full):
    oracle = preset("oracle@4f")
    for wrong, text in (
        ([None], r"'outputs' is NoneType. It must be FrameOutputs, as rollout"),
        (recorded_full.tables["mass"], r"'outputs' is FrameMass. It must be FrameOutputs"),
        (recorded_full.tables["outputs"][0], r"FrameOutputs tables 'outputs' were given for 1 sam"),
    ):
        with pytest.raises(ValueError, match=text):
            roll(tiny(), oracle, tables={"outputs": wrong})
    eight = replace(oracle, retain=replace(oracle.retain, queries=8))
    with pytest.raises(
        ValueError, match=r"recorded with 4 queries of each pass, .* wants 8. Record"
    ):
        roll(tiny(), eight, tables=recorded_full.tables)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_missing_table_is_refused(name, recorded_full):
    (need,) = preset(name).needs
    text = rf"needs {need} of the reference rollout.*There: none\. `evaluate` records them; in Pyth"
    with pytest.raises(ValueError, match=text):
        roll(tiny(), preset(f"{name}@4f"))
    (other,) = {"mass", "outputs"} - {need}
    with pytest.raises(ValueError, match=rf"needs {need} of.*There: {other}\. `evaluate` records"):
        tables = {other: recorded_full.tables[other]}
        roll(tiny(), preset(f"{name}@4f"), tables=tables)


def with_queries(name, retain=None, select=None):
    parts = {"retain": ("oracle", retain), "select": ("oracle-reads", select)}
    return policy_from_dict(
        {"name": name}
        | {
            kind: {"part": part, "queries": queries, "budget": "4f"}
            for kind, (part, queries) in parts.items()
            if queries
        }
    )


def test_needs_of_policies_that_contradict_each_other_are_refused():
    one, other = with_queries("one", retain=4), with_queries("other", select=8)
    assert needs_of([one, with_queries("same", select=4)]) == {"outputs": {"queries": 4}}
    assert needs_of([preset("full"), preset("oracle-mass@6f"), one]) == {
        "mass": {},
        "outputs": {"queries": 4},
    }
    text = r"'outputs' once: 'one' wants it with .*4\} and 'other' with .*8\}\. Give both the same"
    with pytest.raises(ValueError, match=text):
        needs_of([one, other])
    text = r"Two parts of 'both' want 'outputs'.*4\} and .*8\}\. Give both the same"
    with pytest.raises(ValueError, match=text):
        needs_of([with_queries("both", retain=4, select=8)])


@pytest.mark.parametrize(
    ("part", "settings", "text"),
    [
        (Oracle, {"objective": "guess"}, "guess"),
        (Oracle, {"granularity": "token"}, "token"),
        (Oracle, {"discount": -0.1}, r"discount=-0.1 of the retain part 'oracle'.* from 0 to 1"),
        (Oracle, {"discount": 1.1}, r"discount=1.1 .* from 0 to 1"),
        (Oracle, {"discount": float("nan")}, r"discount=nan .* from 0 to 1"),
        (Oracle, {"queries": 0}, r"queries=0 .* 1 or more"),
        (Oracle, {"horizon": 0}, r"horizon=0 .* 1 or more"),
        (Oracle, {"sink": -1}, r"sink=-1 .* 0 or more"),
        (OracleReads, {"objective": "guess"}, "guess"),
        (OracleReads, {"queries": 0}, r"queries=0 of the select part 'oracle-reads'.* 1 or more"),
        (OracleReads, {"refresh": "never"}, "never"),
    ],
)
def test_settings_out_of_range_are_refused(part, settings, text):
    with pytest.raises(ValueError, match=text):
        part(**settings)


def test_ranks_are_not_compared_between_heads():
    """Each head ranks from 0 on; mass can be compared, and is."""
    for part in ("oracle", "oracle-reads"):
        kind = "retain" if part == "oracle" else "select"
        for objective, fine in (("mass", True), ("output", False)):
            budget = {"part": "adaptive", "amount": "4f"}
            own = {"part": part, "objective": objective, "budget": budget}
            made = policy_from_dict({"name": "x", kind: own})
            if fine:
                made.check(sessions.GEOMETRY, 2, 12)
                continue
            with pytest.raises(
                ValueError, match=r"compares scores between heads.*only rank within"
            ):
                made.check(sessions.GEOMETRY, 2, 12)
