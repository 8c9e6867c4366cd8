"""Prompt switches: what memory holds afterwards, against an independent encoding of past frames."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.cache.table import Table
from lightning_kv.models.samplers import spaced
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.policies.retain.window import Window
from lightning_kv.rollout import rollout

CHUNK, FRAMES = 3, 24
TINY = WanConfig(
    dim=24,
    ffn_dim=48,
    layers=2,
    heads=2,
    channels=3,
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    train_horizon=21,
    timesteps=(1000.0, 600.0),
)
OLD, NEW, THIRD = "a cat", "two dogs", "three"


def encoder(prompts):
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)) + 1)
        rows.append(10 * torch.randn(3, 10, generator=rng, dtype=torch.float64))
    return torch.stack(rows)


def model(**changes):
    torch.manual_seed(0)
    network = CausalWan(replace(TINY, **changes)).double()
    return VideoModel(network.eval(), None, encoder)


class Memory:
    """Keys and values of every held frame: before each switch, and in the first pass after it."""

    def __init__(self, switches):
        self.switches = switches
        self.before, self.after = {}, {}

    def progress(self, chunk, session):
        """Called between a chunk's commit and what happens at the next chunk's start."""
        frame = CHUNK * (chunk + 1)
        for sample, cache in enumerate(session.samples):
            for namespace, stores in cache.stores.items():
                for layer, store in enumerate(stores):
                    self.before[frame, namespace, sample, layer] = held(table(store))

    def watch(self, view):
        step = view.step
        if step.start in self.switches and step.phase == "denoise" and step.step == 0:
            self.after[step.start, step.namespace, view.sample, view.layer] = held(view)


def table(store):
    return Table(store.memory, store.frames, store.geometry, store.rotated, store.whole)


def held(rows):
    """``{frame: (keys [H, T, D], values)}``; all heads hold the same frames here."""
    assert not rows.ragged
    ids = rows.frame_id
    assert bool((ids == ids[0]).all())
    assert list(rows.frames) == sorted(set(ids[0].tolist()))
    k, v = rows.keys(), rows.values()
    return {f: (k[:, ids[0] == f].clone(), v[:, ids[0] == f].clone()) for f in ids[0].tolist()}


def run(policy, events, made=None, frames=FRAMES, prompts=OLD, **options):
    memory = Memory({event.frame for event in events})
    made = made or model()
    out = rollout(
        made,
        policy,
        prompts,
        frames,
        decode=False,
        events=events,
        watch=memory.watch,
        progress=memory.progress,
        **options,
    )
    return out, memory


@torch.inference_mode()
def encoded(network, latents, frames, prompt, chunk=CHUNK):
    """Rows of past frames under a prompt: block-causal among themselves, nothing before them."""
    session = CacheSession(network.geometry(), preset("full"))
    text = network.prepare(encoder([prompt]))
    for low in range(0, len(frames), chunk):
        ids = tuple(frames[low : low + chunk])
        step = Pass("commit", ids, (0.0,) * len(ids), 0, final=ids)
        network(latents[:, list(ids)], torch.zeros(1, len(ids)), text, session, step)
        session.finish(step)
    return [held(table(store)) for store in session.samples[0].stores["cond"]]


@torch.inference_mode()
def together(network, latents, sink, reach, prompt, before=OLD, chunk=CHUNK):
    """Rows of past frames in one pass under a prompt, with the sink's, made under another."""
    session = CacheSession(network.geometry(), preset("full"))
    parts = [sink[low : low + chunk] for low in range(0, len(sink), chunk)]
    for ids, own in [*((part, before) for part in parts), (reach, prompt)]:
        step = Pass("commit", tuple(ids), (0.0,) * len(ids), 0, final=tuple(ids))
        text = network.prepare(encoder([own]))
        network(latents[:, list(ids)], torch.zeros(1, len(ids)), text, session, step)
        session.finish(step)
    return [held(table(store)) for store in session.samples[0].stores["cond"]]


def same(a, b, exact=False):
    if exact:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return all(torch.allclose(x, y, atol=1e-9, rtol=0) for x, y in zip(a, b, strict=True))


# -- recache ---------------------------------------------------------------------------------


def expected(frame, history=9, sink=3):
    """LongLive's rule: the last 12 frames (or all) are encoded, the newest that fit are held."""
    reach = list(range(max(0, frame - history - CHUNK), frame))
    kept = min(frame, history) - min(sink, frame)
    hold = [f for f in reach if f >= sink]
    return reach, hold[len(hold) - kept :], list(range(min(sink, frame)))


def causal(**settings):
    """LongLive's window, encoded again chunk by chunk."""
    retain = replace(preset("longlive").retain, switch="recache-causal", **settings)
    return replace(preset("longlive"), retain=retain)


@pytest.mark.parametrize("frame", [3, 6, 9, 12, 15, 18, 21])
def test_recache_reads_sink_and_window_together(frame):
    made = model()
    out, memory = run(preset("longlive"), [Event("prompt_switch", frame, NEW)], made)
    _, hold, sink = expected(frame)
    reach = list(range(max(3, frame - 9), frame))
    fresh = together(made.network, out.latents, sink, reach, NEW) if hold else None
    chunks = encoded(made.network, out.latents, reach, NEW) if hold else None
    for layer in range(TINY.layers):
        before = memory.before[frame, "cond", 0, layer]
        after = memory.after[frame, "cond", 0, layer]
        assert list(after) == sink + hold
        assert all(same(after[f], before[f], exact=True) for f in sink)
        assert all(same(after[f], fresh[layer][f]) for f in hold)
        if layer and hold:
            assert not any(same(after[f], before[f]) for f in hold)
            assert not any(same(after[f], chunks[layer][f]) for f in hold)
    assert out.costs[0].rebuilt_frames == (len(reach) if hold else 0)
    assert out.rebuilds == bool(hold)


@pytest.mark.parametrize(
    ("budget", "sink"), [("6f", 3), ("9f", 0), ("8f", 2), ("4f", 1), ("3f", 0)]
)
def test_recache_together_keeps_to_other_budgets(budget, sink):
    part = {"part": "window", "sink": sink, "budget": budget, "switch": "recache"}
    policy, made = policy_from_dict({"name": "x", "retain": part}), model()
    out, memory = run(policy, [Event("prompt_switch", 15, NEW)], made)
    history = int(budget[:-1])
    reach = list(range(15 - history - CHUNK + sink, 15))
    after = [memory.after[15, "cond", 0, layer] for layer in range(TINY.layers)]
    assert list(after[0]) == [*range(sink), *range(15 - history + sink, 15)]
    assert out.costs[0].rebuilt_frames == len(reach)
    if sink in (0, 3):  # chunks of the sink are encoded as they were
        fresh = together(made.network, out.latents, list(range(sink)), reach, NEW)
        for own, wanted in zip(after, fresh, strict=True):
            assert all(same(own[f], wanted[f]) for f in own)


@pytest.mark.parametrize("frame", [3, 6, 9, 12, 15, 18, 21])
def test_recache_holds_the_sink_and_newly_encoded_frames(frame):
    made = model()
    out, memory = run(causal(), [Event("prompt_switch", frame, NEW)], made)
    reach, hold, sink = expected(frame)
    fresh = encoded(made.network, out.latents, reach, NEW)
    stale = encoded(made.network, out.latents, reach, OLD)
    for layer in range(TINY.layers):
        before = memory.before[frame, "cond", 0, layer]
        after = memory.after[frame, "cond", 0, layer]
        assert list(after) == sink + hold
        assert all(same(after[f], before[f], exact=True) for f in sink)
        assert all(same(after[f], fresh[layer][f]) for f in hold)
        if layer and hold:  # the text is met after the first layer's keys are made
            assert not any(same(after[f], stale[layer][f]) for f in hold)
            assert not any(same(after[f], before[f]) for f in hold)
    encoded_again = len(reach) if hold else 0
    assert out.costs[0].rebuilt_frames == encoded_again
    assert out.rebuilds == encoded_again // CHUNK


@pytest.mark.parametrize(
    ("budget", "sink"), [("6f", 3), ("9f", 0), ("8f", 2), ("4f", 1), ("3f", 0)]
)
def test_recache_keeps_to_other_budgets(budget, sink):
    part = {"part": "window", "sink": sink, "budget": budget, "switch": "recache-causal"}
    policy, made = policy_from_dict({"name": "x", "retain": part}), model()
    out, memory = run(policy, [Event("prompt_switch", 15, NEW)], made)
    reach, hold, first = expected(15, int(budget[:-1]), sink)
    fresh = encoded(made.network, out.latents, reach, NEW)
    for layer in range(TINY.layers):
        after = memory.after[15, "cond", 0, layer]
        assert list(after) == first + hold
        assert all(same(after[f], fresh[layer][f]) for f in hold)


def test_recache_holds_nothing_else_where_the_sink_is_the_budget():
    _, memory = run(preset("longlive@3f"), [Event("prompt_switch", 15, NEW)])
    assert list(memory.after[15, "cond", 0, 0]) == [0, 1, 2]


def test_a_short_chunk_to_come_does_not_shorten_what_is_encoded():
    out, _ = run(preset("longlive"), [Event("prompt_switch", 21, NEW)], frames=22)
    assert out.costs[0].rebuilt_frames == 9
    out, _ = run(causal(), [Event("prompt_switch", 21, NEW)], frames=22)
    assert out.costs[0].rebuilt_frames == 12


def test_a_full_cache_is_encoded_anew():
    part = {"part": "window", "switch": "recache-causal"}
    policy, made = policy_from_dict({"name": "x", "retain": part}), model()
    out, memory = run(policy, [Event("prompt_switch", 15, NEW)], made)
    fresh = encoded(made.network, out.latents, range(15), NEW)
    for layer in range(TINY.layers):
        after = memory.after[15, "cond", 0, layer]
        assert list(after) == list(range(15))
        assert all(same(after[f], fresh[layer][f]) for f in after)


@pytest.mark.parametrize("frames", [(6, 9), (9, 15), (12, 21)])
def test_two_switches(frames):
    made = model()
    prompts = dict(zip(frames, (NEW, THIRD), strict=True))
    events = [Event("prompt_switch", f, p) for f, p in prompts.items()]
    out, memory = run(causal(), events[::-1], made)  # their order does not matter
    for frame, prompt in prompts.items():
        reach, hold, sink = expected(frame)
        fresh = encoded(made.network, out.latents, reach, prompt)
        for layer in range(TINY.layers):
            after = memory.after[frame, "cond", 0, layer]
            assert list(after) == sink + hold
            assert all(same(after[f], fresh[layer][f]) for f in hold)
            before = memory.before[frame, "cond", 0, layer]
            assert all(same(after[f], before[f], exact=True) for f in sink)


def test_every_sample_of_a_batch_is_encoded_by_itself():
    made, events = model(), [Event("prompt_switch", 12, NEW)]
    both, memory = run(preset("longlive"), events, made, prompts=[OLD, THIRD])
    for sample, prompt in enumerate((OLD, THIRD)):
        one, single = run(preset("longlive"), events, made, prompts=prompt)
        torch.testing.assert_close(both.latents[sample], one.latents[0], atol=1e-9, rtol=0)
        for layer in range(TINY.layers):
            mine = memory.after[12, "cond", sample, layer]
            alone = single.after[12, "cond", 0, layer]
            assert mine.keys() == alone.keys()
            assert all(same(mine[f], alone[f]) for f in mine)
        assert both.costs[sample].rebuilt_frames == 9


@dataclass(frozen=True)
class Again(RetainPart):
    """At a switch, the last frames are encoded again under the prompt they were made for."""

    def event(self, event, views, state):
        return Rebuild(tuple(range(6, 12)), "old") if event.kind == "prompt_switch" else None


def test_every_sample_of_a_batch_is_encoded_under_its_own_prompt():
    made, events = model(), [Event("prompt_switch", 12, NEW)]
    policy = replace(preset("full"), retain=Again())
    both, memory = run(policy, events, made, prompts=[OLD, THIRD])
    for sample, prompt in enumerate((OLD, THIRD)):
        fresh = encoded(made.network, both.latents[sample : sample + 1], range(6, 12), prompt)
        for layer in range(TINY.layers):
            after = memory.after[12, "cond", sample, layer]
            assert list(after) == list(range(6, 12))
            assert all(same(after[f], fresh[layer][f]) for f in after)


def test_memory_stays_within_the_budget_from_chunk_to_chunk():
    events = [Event("prompt_switch", 12, NEW), Event("prompt_switch", 18, OLD)]
    switched, memory = run(preset("longlive"), events)
    plain, _ = run(preset("longlive"), [])
    assert switched.costs[0].chunk_bytes == plain.costs[0].chunk_bytes
    assert all(len(frames) <= 9 for frames in memory.before.values())
    assert torch.equal(switched.latents[:, :12], plain.latents[:, :12])
    assert not torch.allclose(switched.latents[:, 12:15], plain.latents[:, 12:15], atol=1e-4)


# -- flush and keep --------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [3, 6, 15, 21])
@pytest.mark.parametrize(("sink", "budget"), [(1, "3f"), (0, "9f"), (3, "9f")])
def test_flush_leaves_the_sink_and_the_newest_frame(frame, sink, budget):
    part = {"part": "window", "sink": sink, "budget": budget, "switch": "flush"}
    policy = policy_from_dict({"name": "x", "retain": part})
    out, memory = run(policy, [Event("prompt_switch", frame, NEW)])
    left = sorted({*range(min(sink, frame)), frame - 1})
    for layer in range(TINY.layers):
        after = memory.after[frame, "cond", 0, layer]
        before = memory.before[frame, "cond", 0, layer]
        assert list(after) == left
        assert all(same(after[f], before[f], exact=True) for f in left)
    assert out.rebuilds == out.costs[0].rebuilt_frames == 0


def test_infinity_rope_flushes():
    _, memory = run(preset("infinity-rope"), [Event("prompt_switch", 12, NEW)])
    assert list(memory.before[12, "cond", 0, 0]) == [0, 10, 11]
    assert list(memory.after[12, "cond", 0, 0]) == [0, 11]


def test_keep_changes_no_row():
    _, memory = run(preset("sink-window"), [Event("prompt_switch", 12, NEW)])
    for layer in range(TINY.layers):
        before = memory.before[12, "cond", 0, layer]
        after = memory.after[12, "cond", 0, layer]
        assert list(before) == list(after) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
        assert all(same(after[f], before[f], exact=True) for f in after)


@pytest.mark.parametrize("name", ["longlive", "infinity-rope", "sink-window"])
def test_a_scene_cut_is_no_prompt_switch(name):
    """No row changes; infinity-rope lets all that is held appear far away."""
    cut, memory = run(preset(name), [Event("scene_cut", 12)])
    plain = run(preset(name), [])[0].latents
    assert torch.equal(cut.latents[:, :12], plain[:, :12])
    assert torch.equal(cut.latents, plain) == (name != "infinity-rope")
    assert list(memory.before[12, "cond", 0, 0]) == list(memory.after[12, "cond", 0, 0])
    assert cut.rebuilds == 0


# -- the text --------------------------------------------------------------------------------


def texts(made, calls):
    """Record each pass with the prompt whose keys it met."""
    known = {p: made.network.prepare(encoder([p])) for p in (OLD, NEW, THIRD, "")}
    forward = made.network.forward

    def spy(x, level, text, session, step):
        met = text[0][0][:1]  # of a batch, so it agrees up to rounding
        (name,) = [p for p, own in known.items() if same([own[0][0]], [met])]
        calls.append((step, name))
        return forward(x, level, text, session, step)

    made.network.forward = spy


@pytest.mark.parametrize("name", ["longlive", "infinity-rope", "sink-window"])
@torch.inference_mode()
def test_chunks_after_a_switch_meet_the_new_text(name):
    made, calls = model(), []
    texts(made, calls)
    events = [Event("prompt_switch", 9, NEW), Event("prompt_switch", 18, THIRD)]
    run(preset(name), events, made)
    for step, prompt in calls:
        if not step.rebuild:
            assert prompt == (OLD if step.start < 9 else NEW if step.start < 18 else THIRD)
    again = [(step.chunk, prompt) for step, prompt in calls if step.rebuild]
    encodings = [(3, NEW), (6, THIRD)]
    assert again == (encodings if name == "longlive" else [])


@pytest.mark.parametrize("branches", ["each", "shared"])
@torch.inference_mode()
def test_under_guidance_each_branch_is_encoded_under_its_own_text(branches):
    made, calls = model(sampler="flow", timesteps=spaced(2, 5.0), guidance=2.0), []
    policy = replace(causal(), branches=branches)
    texts(made, calls)
    out, memory = run(policy, [Event("prompt_switch", 15, NEW)], made)
    again = [(step.namespace, prompt) for step, prompt in calls if step.rebuild]
    assert again == [("cond", NEW)] * 4 + [("uncond", "")] * 4
    assert {p for step, p in calls if step.namespace == "uncond"} == {""}
    reach, hold, sink = expected(15)
    for namespace, prompt in (("cond", NEW), ("uncond", "")):
        fresh = encoded(made.network, out.latents, reach, prompt)
        for layer in range(TINY.layers):
            after = memory.after[15, namespace, 0, layer]
            before = memory.before[15, namespace, 0, layer]
            assert list(after) == sink + hold
            assert all(same(after[f], before[f], exact=True) for f in sink)
            assert all(same(after[f], fresh[layer][f]) for f in hold)


@pytest.mark.parametrize("branches", ["each", "shared"])
def test_under_guidance_both_branches_flush(branches):
    made = model(sampler="flow", timesteps=spaced(2, 5.0), guidance=2.0)
    policy = replace(preset("infinity-rope"), branches=branches)
    _, memory = run(policy, [Event("prompt_switch", 15, NEW)], made)
    for namespace in ("cond", "uncond"):
        assert list(memory.before[15, namespace, 0, 1]) == [0, 13, 14]
        assert list(memory.after[15, namespace, 0, 1]) == [0, 14]


# -- several chunks in flight ----------------------------------------------------------------


@dataclass(frozen=True)
class Noting(Window):
    """A window that writes down where a switch found it."""

    notes: ClassVar[list] = []

    def event(self, event, views, state):
        if event.kind != "start":
            self.notes.append((event.frame, views[0].step.frames, views[0].step.timesteps))
        return super().event(event, views, state)


@pytest.mark.parametrize("frame", [3, 6, 12, 21])
@torch.inference_mode()
def test_a_switch_comes_before_the_first_pass_over_its_frame(frame):
    levels = (1000.0, 800.0, 500.0)
    made, calls = model(sampler="rolling", timesteps=levels), []
    texts(made, calls)
    plain = preset("sliding-window")
    policy = replace(plain, retain=Noting(plain.retain.budget))
    Noting.notes.clear()
    run(policy, [Event("prompt_switch", frame, NEW)], made)
    ((when, coming, noise),) = Noting.notes
    assert when == frame
    # the chunk of the switch enters as pure noise, behind at most two chunks in flight
    assert coming == tuple(range(max(0, frame - 6), frame + 3))
    assert noise[-3:] == (1000.0,) * 3
    entered = next(i for i, (step, _) in enumerate(calls) if frame in step.frames)
    assert {prompt for _, prompt in calls[:entered]} == {OLD}
    assert {prompt for _, prompt in calls[entered:]} == {NEW}


def test_a_switch_with_chunks_in_flight_encodes_final_frames_alone():
    made = model(sampler="rolling", timesteps=(1000.0, 800.0, 500.0))
    seen = {}

    def watch(view):
        if view.step.start == 9 and view.step.opens:
            seen[view.layer] = held(view)

    events = [Event("prompt_switch", 15, NEW)]
    out = rollout(made, preset("longlive"), OLD, FRAMES, decode=False, events=events, watch=watch)
    fresh = together(made.network, out.latents, range(3), range(3, 9), NEW)
    for layer, after in seen.items():
        assert list(after) == list(range(9))
        assert all(same(after[f], fresh[layer][f]) for f in range(3, 9))
    assert bool(out.latents.isfinite().all())
