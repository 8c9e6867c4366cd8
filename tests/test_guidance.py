"""Classifier-free guidance: two branches with a cache each, against two sessions kept by hand."""

import json
from dataclasses import replace

import pytest
import torch

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.samplers import ChunkPlan, few_step, keyed_noise, spaced
from lightning_kv.models.unipc import UniPC
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import policy_from_dict, policy_to_dict, preset
from lightning_kv.rollout import rollout

CHUNK, FRAMES, STEPS = 2, 10, 2
TINY = WanConfig(
    dim=24,
    ffn_dim=48,
    layers=2,
    heads=2,
    channels=3,
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    chunk=CHUNK,
    train_horizon=6,
    sampler="flow",
    timesteps=spaced(STEPS, 5.0),
    guidance=3.0,
)
POLICIES = {
    "full": {},
    "window": {"retain": {"part": "window", "sink": 1, "budget": "3f"}},
    "top-attention": {"select": {"part": "top-attention", "budget": "2f"}},
    "h2o": {"retain": {"part": "heavy-hitters", "granularity": "token", "budget": "21t"}},
    "moved": {
        "retain": {"part": "heavy-hitters", "granularity": "token", "budget": "21t"},
        "select": {"part": "top-attention", "budget": "2f", "refresh": "chunk"},
        "positions": "contiguous",
        "precision": {"part": "aged", "codec": "int8", "age": 2},
    },
}


def encoder(prompts):
    """Text states by the letters of a prompt; loud, so that the branches see different things."""
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)) + 1)
        rows.append(20 * torch.randn(3, 10, generator=rng, dtype=torch.float64))
    return torch.stack(rows)


def model(guidance=3.0, sampler="flow"):
    torch.manual_seed(0)
    config = replace(TINY, guidance=guidance, sampler=sampler)
    network = CausalWan(config).double()
    with torch.no_grad():
        for block in network.blocks:
            block.modulation *= 3  # more of the prompt reaches the attention of the next layer
    return VideoModel(network.eval(), None, encoder)


def policy(name, branches="each"):
    return policy_from_dict({"name": name, "branches": branches} | POLICIES[name])


def run(name="full", branches="each", guidance=3.0, **options):
    options = {"prompts": "a cat", "negative": "blurry"} | options
    prompts = options.pop("prompts")
    made = policy(name, branches) if isinstance(name, str) else name
    return rollout(model(guidance), made, prompts, FRAMES, decode=False, **options)


# -- latents ---------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(name, guidance, prompts=("a cat",), context=None):
    """Velocities of two sessions that know nothing of each other, combined."""
    network = model().network
    plan = ChunkPlan(FRAMES, CHUNK, 0 if context is None else context.shape[1])
    made = policy(name)
    sides = []
    for text in (list(prompts), ["blurry"] * len(prompts)):
        session = CacheSession(network.geometry(), made, range(len(prompts)))
        sides.append((session, network.prepare(encoder(text))))
    noise = keyed_noise(0, list(prompts), plan, (3, 4, 6))

    def velocity(step, x):
        found = []
        for session, text in sides:
            t = torch.tensor(step.timesteps).expand(len(x), -1)
            found.append(network(x, t, text, session, step))
            session.finish(step)
        cond, uncond = found
        return uncond + guidance * (cond - uncond)

    out = []
    for chunk in range(plan.count):
        ids = plan.ids(chunk)
        after = CHUNK if chunk + 1 < plan.count else 0
        if chunk < plan.given:
            x, phase = context[:, list(ids)], "prefill"
        else:
            x, phase = noise(chunk, 0).double(), "commit"
            solver = UniPC([t / 1000 for t in TINY.timesteps])
            for step, t in enumerate(TINY.timesteps):
                here = Pass("denoise", ids, (t,) * 2, chunk, step, (), step == 0, after)
                sigma = torch.tensor(t).double() / 1000  # levels reach the model in float32
                x = solver.step(x - sigma * velocity(here, x), x)
        opens = phase == "prefill"
        velocity(Pass(phase, ids, (0.0,) * 2, chunk, 0, ids, opens, after), x)
        out.append(x)
    return torch.cat(out, 1)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.thinned(3)
def test_latents_equal_two_sessions_kept_by_hand(name, guidance):
    out = run(name, guidance=guidance)
    torch.testing.assert_close(out.latents, by_hand(name, guidance), atol=1e-9, rtol=0)
    other = run(name, guidance=guidance, negative="sharp")
    assert (other.latents - out.latents).abs().max() > 1e-3


def test_latents_of_a_batch_with_a_context_equal_two_sessions_kept_by_hand():
    prompts = ["a cat", "two dogs"]
    context = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    out = run("window", prompts=prompts, context=context)
    torch.testing.assert_close(
        out.latents, by_hand("window", 3.0, prompts, context), atol=1e-9, rtol=0
    )
    assert torch.equal(out.latents[:, :4], context)


@pytest.mark.parametrize("name", ["full", "window", "h2o"])
def test_guidance_of_one_runs_the_prompt_alone(name):
    out = run(name, guidance=1.0)
    assert set(out.session.samples[0].stores) == {"cond"}
    torch.testing.assert_close(out.latents, by_hand(name, 1.0), atol=1e-9, rtol=0)
    assert torch.equal(out.latents, run(name, guidance=1.0, negative="sharp").latents)


def test_equal_prompts_need_no_guidance():
    """Both branches say the same, so the scale multiplies zero."""
    out = run("h2o", negative="a cat")
    torch.testing.assert_close(out.latents, run("h2o", guidance=1.0).latents, atol=1e-9, rtol=0)


# -- what each branch keeps and reads --------------------------------------------------------


class Spy:
    """What each branch holds and reads, by pass, sample and layer."""

    def __init__(self):
        self.seen = {"cond": {}, "uncond": {}}

    def __call__(self, view):
        step = view.step
        ids, places = (x.expand(view.heads, -1).tolist() for x in (view.frame_id, view.raster))
        rows = [
            tuple(zip(a[:length], b[:length], strict=True))
            for a, b, length in zip(ids, places, view.lengths, strict=True)
        ]
        read = None if view.selection is None else view.selection.frames.tolist()
        key = (view.sample, view.layer, step.phase, step.frames, step.step)
        assert key not in self.seen[step.namespace]
        self.seen[step.namespace][key] = (rows, read)


def spied(name, branches, **options):
    spy = Spy()
    out = run(name, branches, watch=spy, **options)
    cond, uncond = spy.seen.values()
    assert cond.keys() == uncond.keys()
    same = sum(cond[key] == uncond[key] for key in cond)
    return out, same, len(cond)


@pytest.mark.parametrize("name", POLICIES)
def test_shared_branches_keep_and_read_the_same_rows(name):
    prompts = ["a cat", "two dogs"]
    out, same, passes = spied(name, "shared", prompts=prompts)
    assert passes == 2 * TINY.layers * (FRAMES // CHUNK) * (STEPS + 1)
    assert same == passes
    for sample in range(2):
        stores = out.session.samples[sample].stores
        for cond, uncond in zip(stores["cond"], stores["uncond"], strict=True):
            assert cond.frames == uncond.frames
            for a, b in zip(cond.memory.groups, uncond.memory.groups, strict=True):
                assert a.heads == b.heads and a.layout == b.layout, "the same codecs"
                for field in ("frame_id", "place", "time", "weight"):
                    assert torch.equal(a.meta[field], b.meta[field])
        keys = [store.memory.groups[0].payload("k") for store in (cond, uncond)]
        assert keys[0].shape == keys[1].shape
        # their prompts differ, and tell in every layer but the first
        assert not torch.allclose(*keys, atol=1e-3)


@pytest.mark.parametrize("name", ["top-attention", "h2o", "moved"])
def test_each_branch_may_decide_otherwise(name):
    _, same, passes = spied(name, "each")
    assert same < passes
    differ = run(name, "each").latents - run(name, "shared").latents
    assert differ.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["full", "window"])
def test_sharing_changes_nothing_where_no_score_is_taken(name):
    differ = run(name, "each").latents - run(name, "shared").latents
    assert differ.abs().max() <= 1e-9


def test_the_prompts_branch_is_that_of_a_rollout_of_its_own():
    """The first chunk's commit of the leading branch knows nothing of the other one."""
    spies = []
    for guidance in (1.0, 3.0):
        spy = Spy()
        run("top-attention", "shared", guidance=guidance, watch=spy)
        spies.append(spy.seen["cond"])
    first = [key for key in spies[0] if key[3] == (0, 1)]
    assert first
    assert all(spies[0][key] == spies[1][key] for key in first)


# -- bytes -----------------------------------------------------------------------------------


def row_bytes():
    """Keys, values and fields of one frame in all layers of one branch."""
    tokens = 6
    return TINY.layers * tokens * (2 * TINY.dim * 8 + 20)


@pytest.mark.parametrize("branches", ["each", "shared"])
def test_both_branches_are_counted(branches):
    single, both = run("full", guidance=1.0), run("full", branches)
    assert (
        both.session.held_bytes(0) == 2 * single.session.held_bytes(0) == 2 * FRAMES * row_bytes()
    )
    assert both.costs[0].peak_bytes == 2 * single.costs[0].peak_bytes
    assert both.costs[0].rows_read == 2 * single.costs[0].rows_read
    assert both.costs[0].rows_history == 2 * single.costs[0].rows_history
    assert len(both.costs[0].chunk_bytes) == FRAMES // CHUNK


def test_bytes_of_a_chunk_count_both_branches_in_flight():
    single, both = run("full", guidance=1.0), run("full")
    assert both.costs[0].chunk_bytes == [2 * held for held in single.costs[0].chunk_bytes]


def test_a_budget_in_bytes_holds_for_both_branches_together():
    limit = 12 * row_bytes()
    made = policy_from_dict({"name": "w", "retain": {"part": "window", "budget": f"{limit}B"}})
    assert run(made).costs[0].peak_bytes <= limit


# -- plain data ------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", ["each", "shared"])
@pytest.mark.parametrize("name", POLICIES)
def test_policies_survive_as_plain_data(name, branches):
    made = policy(name, branches)
    values = policy_to_dict(made)
    assert values["branches"] == branches
    assert policy_from_dict(values) == made
    assert policy_from_dict(json.loads(json.dumps(values))) == made


def test_unknown_branches_are_refused():
    with pytest.raises(ValueError, match="branches='both' of policy 'x': use each or shared"):
        policy_from_dict({"name": "x", "branches": "both"})


def test_samplers_without_guidance_have_one_branch():
    out = rollout(
        model(), preset("full"), "a cat", FRAMES, decode=False, sampler=few_step, negative="blurry"
    )
    assert set(out.session.samples[0].stores) == {"cond"}
