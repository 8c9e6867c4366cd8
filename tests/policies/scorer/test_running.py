"""The parts that rank by a scorer: untrained ones are the policies that they begin as."""

from functools import cache

import pytest
import torch

from lightning_kv import load_policy, preset, rollout
from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.policies.registry import policy_from_dict, policy_to_dict, sized
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.policies.scorer.running import lists_of
from lightning_kv.policies.scorer.seen import STATS, Seen
from lightning_kv.testing.candidate import headed, play, tape, within
from lightning_kv.testing.schedules import chunked, without_commits
from lightning_kv.testing.tapes import random_tape

ALL = 10**6  # queries
NAMES = tuple(FEATURES)
UNEVEN = {"part": "table", "amount": "6f", "shares": [[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Path of an untrained scorer for a model."""

    @cache
    def made(geometry, prior, queries=64, **settings):
        path = tmp_path_factory.mktemp("scorers") / "scorer.safetensors"
        Scorer.fresh("mlp", geometry, prior=prior, queries=queries, **settings).save(path)
        return str(path)

    return made


def kept_by(path, budget="6f", **others):
    retain = {"part": "distilled", "scorer": path, "budget": budget}
    return policy_from_dict({"name": "kept", "retain": retain, **others})


def read_by(path, budget="6f", **others):
    select = {"part": "distilled-reads", "scorer": path, "budget": budget}
    return policy_from_dict({"name": "read", "select": select, **others})


TWINS = {"recency": "sliding-window", "h2o": "h2o"}


@pytest.mark.parametrize("prior", TWINS)
@pytest.mark.parametrize("budget", ["6f", "9f"])
def test_an_untrained_scorer_is_the_policy_that_it_begins_as(panorama, file, prior, budget):
    path = file(panorama.network.geometry(), prior, ALL)
    ours, theirs = (
        rollout(panorama, policy, "dusk fast n10 left", 36, decode=False).latents
        for policy in (kept_by(path, budget), load_policy(f"{TWINS[prior]}@{budget}"))
    )
    assert ours.equal(theirs)


@pytest.mark.parametrize("name", ["chunks of 1", "short last chunk", "rolling", "given frames"])
@pytest.mark.parametrize("prior", TWINS)
def test_so_it_is_on_tapes_of_other_models(file, prior, name):
    own = tape(name)
    policies = kept_by(file(own.geometry, prior, ALL), "5f"), load_policy(f"{TWINS[prior]}@5f")
    ours, theirs = (play(policy, own).decisions.kept for policy in policies)
    if name == "short last chunk":  # there h2o counts the queries of fewer frames less
        last = own.steps[-1].chunk
        ours, theirs = ({k: x for k, x in one.items() if k[4] < last} for one in (ours, theirs))
    assert ours == theirs and any(len(rows) < 5 * own.geometry.tokens for rows in ours.values())


def test_heads_of_uneven_budgets_keep_the_newest(file):
    own = tape("chunks of 3")
    shares = [[0.6, 1.0, 1.4], [1.4, 1.0, 0.6]]
    budget = {"part": "table", "amount": "5f", "shares": shares}
    found = play(kept_by(file(own.geometry, "recency"), budget), own).decisions.kept
    for (_, _, layer, head, chunk), rows in found.items():
        made, most = 3 * (chunk + 1), round(5 * shares[layer][head])
        assert {row[0] for row in rows} == set(range(max(0, made - most), made))


@pytest.mark.parametrize("name", ["chunks of 3", "rolling", "guided", "two samples"])
def test_an_untrained_scorer_reads_what_is_newest(file, name):
    own = tape(name)
    found = play(read_by(file(own.geometry, "recency"), "5f"), own).decisions.read
    assert found
    for (*_, start, _), rows in found.items():
        assert {row[0] for row in rows} == set(range(max(0, start - 5), start))


@pytest.mark.parametrize("name", ["chunks of 3", "short last chunk", "given frames"])
def test_what_is_read_is_what_would_be_kept(file, name):
    """Where all was held until now, both choose among the same frames by the same pass."""
    own = tape(name)
    path, budget = file(own.geometry, "h2o"), 5
    kept = play(kept_by(path, f"{budget}f"), own).decisions.kept
    read = play(read_by(path, f"{budget}f"), own).decisions.read
    made, first = 0, None
    for step in (step for step in own.steps if step.final):
        made = step.final[-1] + 1
        if made > budget:
            first = step.chunk if first is None else first
    for key, rows in read.items():
        namespace, sample, layer, head, chunk = key[:5]
        if chunk == first + 1:
            assert rows == kept[namespace, sample, layer, head, first]


OVER = ("echo-forcing", "mem-rope", "half-chunks", "rolling-sink", "recompute", "longlive", "r-kv")


@pytest.mark.parametrize("name", [*OVER, "distilled"])
@pytest.mark.parametrize("on", ["events", "rolling"])
def test_reads_are_chosen_over_any_memory(name, on):
    """Frames that come back, are made of others, or anew."""
    own, values = tape(on), policy_to_dict(preset(sized(name, "7f")))
    values |= {"name": "over", "select": {"part": "distilled-reads", "budget": "4f"}}
    policy = within(policy_from_dict(values), own, 8)
    found = play(policy, own)
    assert all(out.isfinite().all() for out in found.outputs)
    most = max(rows for rows, _ in found.decisions.count.values())
    assert most <= 4 * own.geometry.tokens
    assert any(rows < held for rows, held in found.decisions.count.values())


def test_a_share_of_a_short_history_is_a_budget(file):
    own = tape("chunks of 1")
    for policy in (
        kept_by(file(own.geometry, "h2o"), "0.2"),
        read_by(file(own.geometry, "h2o"), "0.2"),
    ):
        assert all(out.isfinite().all() for out in own.play(policy))


@pytest.mark.parametrize("context", [0, 2])
def test_frames_that_no_clean_pass_has_seen_are_refused(file, context):
    own = random_tape(without_commits(chunked((3,) * 5, context=context)))
    path = file(own.geometry, "h2o")
    for policy in (kept_by(path), read_by(path)):
        with pytest.raises(ValueError, match=r"looks at clean passes, .* Use a sampler that comm"):
            own.play(policy)


def test_parts_refuse_what_they_were_not_taught():
    with pytest.raises(ValueError, match=r"granularity='token' .* Use one of: frame"):
        policy_from_dict({"name": "x", "retain": {"part": "distilled", "granularity": "token"}})
    with pytest.raises(ValueError, match=r"refresh='pass' .* Use one of: chunk"):
        policy_from_dict({"name": "x", "select": {"part": "distilled-reads", "refresh": "pass"}})
    for part in ("distilled", "distilled-reads"):
        kind = "select" if "reads" in part else "retain"
        adaptive = {"part": part, "budget": {"part": "adaptive", "amount": "6f"}}
        policy = headed(
            policy_from_dict({"name": "x", kind: adaptive}), tape("chunks of 3").geometry
        )
        with pytest.raises(ValueError, match="only rank within one"):
            policy.check(tape("chunks of 3").geometry, 3, 24)


def test_bytes_of_the_scorer_and_of_what_is_seen_are_bytes_of_the_cache(file):
    own = random_tape(chunked((3,) * 6, 1), gain=3.0)
    path = file(own.geometry, "h2o")
    session = own.session(kept_by(path))
    for _ in own.running(session):
        pass
    state = session.samples[0].states[CONDITIONAL]["retain"]
    student = sum(x.numel() * 4 for x in state["scorer"].state_dict().values())
    seen = state["seen"]
    every = (seen.stats, seen.keys, seen.values, seen.there, seen.query, seen.past, seen.shared)
    remembered = sum(x.numel() * x.element_size() for x in every)
    assert session.samples[0]._fixed_bytes(CONDITIONAL) >= student + remembered
    layers, heads = own.geometry.layers, own.geometry.heads
    assert len(seen.stats) == layers * heads * (6 + 3)  # lines of frames that a head holds
    assert seen.there.shape[2] > 6 + 3  # all heads of a layer hold more


def test_each_head_remembers_its_own_frames_alone():
    """With places for all frames again, it knows of its own what it knew, of others nothing."""
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(2, 3, 11, generator=generator) < 0.5
    there[0, 0] = False
    sizes = {"stats": len(STATS), "keys": 4, "values": 5}
    whole = {x: torch.randn(2, 3, 11, size, generator=generator) for x, size in sizes.items()}
    frames = (tuple(range(11)),) * 2
    blank = torch.zeros(2, 3, 4)
    seen = Seen(frames, **whole, there=there, query=blank, past=blank, queries=1, chunks=1,
                everywhere=frames[0], shared=blank[0])  # fmt: skip
    packed = seen.packed(int(there.sum()))
    for name, own in whole.items():
        assert getattr(packed, name).equal(own[there])
        assert getattr(packed.spread(), name).equal(own * there.unsqueeze(-1))
    assert seen.spread() is seen


def test_one_student_serves_all_samples_and_branches(file):
    own = random_tape(chunked((3,) * 5), batch=2)
    session = own.session(kept_by(file(own.geometry, "h2o")))
    for _ in own.running(session):
        pass
    first, second = (cache.states[CONDITIONAL]["retain"]["scorer"] for cache in session.samples)
    assert first is second


def test_coded_rows_and_moved_ones_are_looked_at_as_they_are_read(file):
    """With int8 the masses are nearly those of plain rows; at other times they are others."""
    own = random_tape(chunked((3,) * 6, 1), gain=3.0)
    path = file(own.geometry, "h2o", ALL)
    found = {}
    for name, others in {
        "plain": {},
        "int8": {"precision": {"part": "aged", "codec": "int8", "age": 3}},
        "moved": {"positions": "contiguous"},
    }.items():
        session = own.session(kept_by(path, **others))
        for step, _ in own.running(session):
            if step.chunk == 3 and step.final:
                break
        found[name] = session.samples[0].states[CONDITIONAL]["retain"]["seen"]
    plain, coded, moved = found.values()
    assert plain.frames == coded.frames
    assert 1e-6 < (plain.stats - coded.stats).abs().max() < 0.05
    assert plain.keys.equal(coded.keys)  # as they were made
    assert moved.frames != plain.frames or (moved.stats - plain.stats).abs().max() > 0.05


def test_layers_that_have_nothing_to_decide_are_left_out(file):
    """They hold more than others, whose lists are no longer for it."""
    own, shares = tape("chunks of 3"), [[1.5, 1.5, 1.5], [0.25, 0.5, 0.75]]
    budget = {"part": "table", "amount": "12f", "shares": shares}
    found = play(kept_by(file(own.geometry, "recency"), budget), own).decisions.kept
    for (_, _, layer, head, chunk), rows in found.items():
        made, most = 3 * (chunk + 1), int(12 * shares[layer][head])
        assert {row[0] for row in rows} == set(range(max(0, made - most), made))


def test_lists_of_one_layer_are_those_of_all_together(file):
    own = tape("chunks of 3")
    session = own.session(kept_by(file(own.geometry, "h2o"), UNEVEN))
    part, compared = session.policy.retain, 0
    for step, _ in own.running(session):
        if step.final and step.chunk > 2:
            cache = session.samples[0]
            views, state = cache.views(step), cache.states[CONDITIONAL]["retain"]
            every = lists_of(part, views, state, NAMES)
            for view, own_list in zip(views, every, strict=True):
                (alone,) = lists_of(part, [view], state, NAMES)
                for name in ("features", "context", "candidate"):
                    ours, theirs = getattr(alone, name), getattr(own_list, name)
                    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
                compared += 1
            widths = {own_list.candidate.shape[1] for own_list in every}
    assert compared == 10 and len(widths) == 2


def test_a_shipped_scorer_is_dealt_to_tapes_of_other_heads(panorama):
    own, small = preset("distilled"), tape("chunks of 3").geometry
    assert headed(own, panorama.network.geometry()) == own
    shipped = own.retain.scorer.scorer(panorama.network.geometry()).student
    dealt = headed(own, small).retain.scorer.scorer(small).student
    assert (dealt.layers, dealt.heads) == (small.layers, small.heads)
    for name, value in dealt.state_dict().items():
        whole = shipped.state_dict()[name]
        assert value.equal(whole[: len(value)])
    assert headed(headed(own, small), small) == headed(own, small)
