"""Samplers against tables kept by hand, noise against its promises, UniPC against diffusers."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_kv.models import samplers
from lightning_kv.models.samplers import (
    NOISE_REVISION,
    ChunkPlan,
    few_step,
    flow,
    keyed_noise,
    renoise,
    rolling,
    sampler_of,
    sigma_of,
    spaced,
    warp,
)
from lightning_kv.models.unipc import UniPC
from lightning_kv.models.wan import WanConfig

LEVELS = (1000.0, 950.0, 800.0, 600.0, 300.0)


class Draws:
    """Random noise, and how often each piece was asked for."""

    def __init__(self, plan):
        self.plan, self.asked, self.made = plan, [], {}

    def __call__(self, chunk, step):
        self.asked.append((chunk, step))
        rng = torch.Generator().manual_seed(1000 * chunk + step)
        frames = len(self.plan.ids(chunk))
        made = torch.randn(1, frames, 2, 1, 1, generator=rng, dtype=torch.float64)
        return self.made.setdefault((chunk, step), made)


def estimate(x, frames, timesteps):
    """A network without attention: each frame by its own latents, id and noise level."""
    ids, levels = (torch.tensor(y).double().view(1, -1, 1, 1, 1) for y in (frames, timesteps))
    return torch.tanh(x) + 0.1 * ids - levels / 1000


def drive(steps):
    """All passes with their latents."""
    out, answer = [], None
    while True:
        try:
            step, x = steps.send(answer)
        except StopIteration:
            return out
        assert x.shape[1] == len(step.frames) == len(step.timesteps)
        out.append((step, x))
        answer = estimate(x, step.frames, step.timesteps)


def told(step):
    return (
        step.phase,
        step.frames,
        step.timesteps,
        step.chunk,
        step.step,
        step.final,
        step.opens,
        step.next_chunk,
    )


def sizes(frames, chunk):
    """Frames of each chunk, the last one maybe short."""
    ids = list(range(frames))
    return [tuple(ids[low : low + chunk]) for low in range(0, frames, chunk)]


def given(context):
    rng = torch.Generator().manual_seed(5)
    return torch.randn(1, context, 2, 1, 1, generator=rng, dtype=torch.float64)


def alone(frames, levels, chunk, draws):
    """One chunk from noise to its clean estimate, on its own."""
    x = draws.made[chunk, 0]
    for index, t in enumerate(levels):
        if index:
            x = (1 - t / 1000) * x + t / 1000 * draws.made[chunk, index]
        x = estimate(x, frames, (t,) * len(frames))
    return x


SHAPES = [  # frames, chunk, context
    (9, 3, 0),
    (8, 3, 0),
    (8, 3, 3),
    (7, 3, 6),
    (4, 1, 0),
    (5, 1, 2),
    (2, 3, 0),
    (21, 3, 3),
    (1, 1, 0),
]


# -- few steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [(), (1000.0, 900.0, 500.0), (1000.0,)])
@pytest.mark.parametrize(("frames", "chunk", "context"), SHAPES)
def test_few_step_goes_chunk_by_chunk(frames, chunk, context, first):
    plan, levels = ChunkPlan(frames, chunk, context, short_last=True), (1000.0, 700.0)
    draws, start = Draws(plan), given(context)
    found = drive(few_step(plan, levels, draws, start if context else None, first))
    parts = sizes(frames, chunk)
    expected, drawn = [], []
    for index, ids in enumerate(parts):
        after = len(parts[index + 1]) if index + 1 < len(parts) else 0
        still = (0.0,) * len(ids)
        if ids[0] < context:
            expected.append(("prefill", ids, still, index, 0, ids, True, after))
            continue
        used = first if first and ids[0] == 0 else levels
        for step, t in enumerate(used):
            same = (t,) * len(ids)
            expected.append(("denoise", ids, same, index, step, (), step == 0, after))
            drawn.append((index, step))
        expected.append(("commit", ids, still, index, 0, ids, False, after))
    assert [told(step) for step, _ in found] == expected
    assert draws.asked == drawn
    for step, x in found:
        if step.phase == "prefill":
            assert torch.equal(x, start[:, list(step.frames)])
        elif step.phase == "commit":
            used = first if first and step.chunk == 0 else levels
            want = alone(step.frames, used, step.chunk, draws)
            torch.testing.assert_close(x, want, atol=1e-12, rtol=0)


def test_few_step_written_out():
    """Causal Forcing++: four levels for the first frame, two for the others."""
    plan = ChunkPlan(3, 1)
    found = drive(few_step(plan, (1000.0, 800.0), Draws(plan), None, (1000.0, 900.0, 800.0, 600.0)))
    assert [told(step) for step, _ in found] == [
        ("denoise", (0,), (1000.0,), 0, 0, (), True, 1),
        ("denoise", (0,), (900.0,), 0, 1, (), False, 1),
        ("denoise", (0,), (800.0,), 0, 2, (), False, 1),
        ("denoise", (0,), (600.0,), 0, 3, (), False, 1),
        ("commit", (0,), (0.0,), 0, 0, (0,), False, 1),
        ("denoise", (1,), (1000.0,), 1, 0, (), True, 1),
        ("denoise", (1,), (800.0,), 1, 1, (), False, 1),
        ("commit", (1,), (0.0,), 1, 0, (1,), False, 1),
        ("denoise", (2,), (1000.0,), 2, 0, (), True, 0),
        ("denoise", (2,), (800.0,), 2, 1, (), False, 0),
        ("commit", (2,), (0.0,), 2, 0, (2,), False, 0),
    ]


# -- several chunks in flight ----------------------------------------------------------------


def table(frames, chunk, context, levels):
    """Passes of the rolling sampler from a table of levels: one enters, all go down, one leaves."""
    parts = sizes(frames, chunk)
    after = {i: len(parts[i + 1]) if i + 1 < len(parts) else 0 for i in range(len(parts))}
    out = []
    waiting, flying, opened = list(range(len(parts))), {}, set()
    while waiting and parts[waiting[0]][0] < context:
        index = waiting.pop(0)
        ids = parts[index]
        out.append(("prefill", ids, (0.0,) * len(ids), index, 0, ids, True, after[index]))
    while waiting or flying:
        if waiting:
            flying[waiting.pop(0)] = 0
        oldest = min(flying)
        ids = sum((parts[i] for i in sorted(flying)), ())
        noise = sum(((levels[flying[i]],) * len(parts[i]) for i in sorted(flying)), ())
        opens = oldest not in opened
        opened.add(oldest)
        out.append(("denoise", ids, noise, oldest, flying[oldest], (), opens, after[oldest]))
        flying = {i: level + 1 for i, level in flying.items()}
        if flying[oldest] == len(levels):
            del flying[oldest]
            own = parts[oldest]
            still = (0.0,) * len(own)
            out.append(("commit", own, still, oldest, 0, own, False, after[oldest]))
    return out


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(("frames", "chunk", "context"), SHAPES)
def test_rolling_follows_the_table(frames, chunk, context, depth):
    plan, levels = ChunkPlan(frames, chunk, context, short_last=True), LEVELS[:depth]
    draws, start = Draws(plan), given(context)
    found = drive(rolling(plan, levels, draws, start if context else None))
    assert [told(step) for step, _ in found] == table(frames, chunk, context, levels)
    new = range(context // chunk, len(sizes(frames, chunk)))
    assert sorted(draws.asked) == [(c, level) for c in new for level in range(depth)]
    seen = {c: [] for c in new}
    for step, _ in found:
        if step.phase == "denoise":
            for ids in sizes(frames, chunk):
                if ids[0] in step.frames:
                    seen[ids[0] // chunk].append(step.timesteps[step.frames.index(ids[0])])
    assert set(map(tuple, seen.values())) == {levels}
    commits = [(step, x) for step, x in found if step.phase == "commit"]
    assert [step.chunk for step, _ in commits] == list(new)
    for step, x in commits:
        want = alone(step.frames, levels, step.chunk, draws)
        torch.testing.assert_close(x, want, atol=1e-12, rtol=0)


def test_rolling_written_out():
    """Two levels, seven frames in chunks of three: both ends of the video."""
    plan = ChunkPlan(7, 3, short_last=True)
    found = drive(rolling(plan, (1000.0, 400.0), Draws(plan), None))
    a, b, c = (0, 1, 2), (3, 4, 5), (6,)
    high, low, still = (1000.0,) * 3, (400.0,) * 3, (0.0,) * 3
    assert [told(step) for step, _ in found] == [
        ("denoise", a, high, 0, 0, (), True, 3),
        ("denoise", a + b, low + high, 0, 1, (), False, 3),
        ("commit", a, still, 0, 0, a, False, 3),
        ("denoise", b + c, low + high[:1], 1, 1, (), True, 1),
        ("commit", b, still, 1, 0, b, False, 1),
        ("denoise", c, low[:1], 2, 1, (), True, 0),
        ("commit", c, still[:1], 2, 0, c, False, 0),
    ]


def test_rolling_with_one_level_makes_the_latents_of_few_step():
    plan = ChunkPlan(8, 3, short_last=True)
    runs = [drive(one(plan, (1000.0,), Draws(plan), None)) for one in (rolling, few_step)]
    for (step, x), (other, y) in zip(*runs, strict=True):
        assert told(step) == told(other)
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


# -- many steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "chunk", "context"), SHAPES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_flow_asks_both_branches(frames, chunk, context, guidance):
    plan, levels = ChunkPlan(frames, chunk, context, short_last=True), spaced(3, 5.0)
    draws = Draws(plan)
    found = drive(flow(plan, levels, draws, given(context) if context else None, guidance))
    branches = ("cond", "uncond") if guidance != 1 else ("cond",)
    parts, expected = sizes(frames, chunk), []
    for index, ids in enumerate(parts):
        after = len(parts[index + 1]) if index + 1 < len(parts) else 0
        still = (0.0,) * len(ids)
        if ids[0] < context:
            passes = [("prefill", ids, still, index, 0, ids, True, after)]
        else:
            passes = [
                ("denoise", ids, (t,) * len(ids), index, step, (), step == 0, after)
                for step, t in enumerate(levels)
            ]
            passes.append(("commit", ids, still, index, 0, ids, False, after))
        expected += [(branch, one) for one in passes for branch in branches]
    assert [(step.namespace, told(step)) for step, _ in found] == expected
    assert draws.asked == [(c, 0) for c in range(context // chunk, len(parts))]
    for (step, x), (other, y) in pairwise(found):
        if (step.namespace, other.namespace) == ("cond", "uncond"):
            assert torch.equal(x, y), "both branches look at the same latents"


# -- schedules and solver --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shift"),
    [
        ((1000, 750, 500, 250), 5.0),
        ((1000, 800, 600, 400, 200), 5.0),
        ((1000, 500), 5.0),
        ((1000,), 5.0),
        ((1000, 750, 500, 250), 8.0),
        ((1000, 850, 700, 550, 350, 275, 200, 125), 12.0),
    ],
)
def test_warp_looks_up_the_published_table(steps, shift):
    s = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    entries = 1000 * shift * s / (1 + (shift - 1) * s)
    assert warp(steps, shift) == pytest.approx([float(entries[1000 - t]) for t in steps], abs=1e-9)


def test_spaced_is_the_rule_of_wan():
    sigma = torch.linspace(0.999, 0, 51, dtype=torch.float64)[:-1]
    want = 1000 * 5 * sigma / (1 + 4 * sigma)
    assert spaced(50, 5.0) == pytest.approx(want.tolist(), abs=1e-9)


def denoiser(x, sigma):
    """A clean estimate that is not linear in anything."""
    return torch.tanh(1.5 * x) * (1 - sigma) + 0.3 * torch.sin(5 * x + 2 * sigma)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", range(1, 21))
def test_unipc_equals_diffusers(steps, shift):
    scheduler = pytest.importorskip("diffusers").UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps)
    # its own levels start at one and are float32: give it Wan's
    levels = [t / 1000 for t in spaced(steps, shift)]
    scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    scheduler.set_begin_index(0)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(steps)).double()
    mine, theirs = x, x
    solver = UniPC(levels)
    for index, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        velocity = (theirs - denoiser(theirs, sigma)) / sigma
        theirs = scheduler.step(velocity, t, theirs, return_dict=False)[0]
        mine = solver.step(denoiser(mine, sigma), mine)
        assert (mine - theirs).abs().max() <= 1e-9
    assert mine.abs().max() > 0.1


def exact(x, start, end, mean=0.7, spread=0.4):
    """Where the flow carries ``x`` when data are Gaussian: standardised, it stands still."""
    width = [((1 - s) ** 2 * spread**2 + s**2) ** 0.5 for s in (start, end)]
    return (1 - end) * mean + width[1] / width[0] * (x - (1 - start) * mean)


def test_unipc_converges_with_its_order():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        solver, state = UniPC(sigmas), x
        for sigma in sigmas:
            at = state
            gain = 0.16 * (1 - sigma) / (0.16 * (1 - sigma) ** 2 + sigma**2)
            state = solver.step(0.7 + gain * (at - (1 - sigma) * 0.7), at)
        errors.append(float((at - exact(x, 0.9, 0.1)).abs().max()))
    assert errors[0] < 1e-3
    orders = [float(torch.tensor(a / b).log2()) for a, b in pairwise(errors)]
    assert min(orders) > 2.5


@pytest.mark.parametrize("sigmas", [[], [1.0, 0.5], [0.5, 0.5], [0.2, 0.4], [0.5, 0.0]])
def test_unipc_refuses_levels_it_cannot_follow(sigmas):
    with pytest.raises(ValueError, match="Give falling levels between 0 and 1"):
        UniPC(sigmas)


# -- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_longer_rollout_draws_the_noise_of_a_shorter_one(chunk):
    shape = (4, 3, 2)
    short = ChunkPlan(7, chunk, short_last=True)
    longer = ChunkPlan(12, chunk, short_last=True)
    one, two = (keyed_noise(3, ["a", "b"], plan, shape) for plan in (short, longer))
    for index in range(short.count):
        for step in range(3):
            count = len(short.ids(index))
            assert one(index, step).shape == (2, count, *shape)
            assert torch.equal(one(index, step), two(index, step)[:, :count])


def test_noise_does_not_care_for_its_neighbours():
    plan, shape = ChunkPlan(6, 3), (4, 3, 2)
    names = ["a", "b", "c"]
    together, turned = (keyed_noise(0, k, plan, shape) for k in (names, names[::-1]))
    other = keyed_noise(1, names, plan, shape)
    for chunk in range(2):
        assert torch.equal(together(chunk, 1), turned(chunk, 1).flip(0))
        assert torch.equal(together(chunk, 1), together(chunk, 1)), "drawing again changes nothing"
        assert not torch.isclose(together(chunk, 1), other(chunk, 1)).any(-1).all()
        for i, name in enumerate(names):
            single = keyed_noise(0, [name], plan, shape)
            assert torch.equal(single(chunk, 1)[0], together(chunk, 1)[i])
    pieces = [
        together(c, s)[i].flatten()[0].item() for c in (0, 1) for s in (0, 1, 2) for i in range(3)
    ]
    assert len(set(pieces)) == len(pieces)


def test_all_of_the_key_counts(monkeypatch):
    """Keys that share their lower, or their upper, 32 and 64 bits draw other noise."""
    plan, found = ChunkPlan(1, 1), []
    for bits in (0, *(2**n for n in (0, 31, 32, 63, 64, 95, 96, 127))):
        monkeypatch.setattr(samplers, "digest", lambda *parts, bits=bits: bits << 128)
        found.append(tuple(keyed_noise(0, ["a"], plan, (1, 2, 2))(0, 0).flatten().tolist()))
    assert len(set(found)) == len(found)


def test_the_noise_of_this_revision():
    """These numbers stand in other people's results: another rule is another revision."""
    assert NOISE_REVISION == 2
    first = keyed_noise(0, ["a prompt"], ChunkPlan(3, 3), (1, 1, 2))(0, 0).flatten().tolist()
    key = int.from_bytes(hashlib.sha256(b"0\x1fa prompt\x1f0\x1f0").digest()[:16], "big")
    rng = np.random.Generator(np.random.Philox(key=key))
    assert first == rng.standard_normal(6, dtype=np.float32).tolist()
    assert first[:4] == pytest.approx([-0.710089, -0.603229, 1.133267, 2.091548], abs=1e-6)


# -- what a checkpoint asks for --------------------------------------------------------------


def test_a_checkpoint_names_its_sampler():
    config = WanConfig(
        dim=12, ffn_dim=12, layers=1, heads=1, first_timesteps=(1000.0, 500.0, 250.0)
    )
    plan = ChunkPlan(2, 1)
    few = drive(sampler_of(config)(plan, (1000.0,), Draws(plan), None))
    assert [s.timesteps[0] for s, _ in few] == [1000, 500, 250, 0, 1000, 0]
    sizes = {"dim": 12, "ffn_dim": 12, "layers": 1, "heads": 1}
    made = WanConfig(**sizes, sampler="flow", timesteps=spaced(2, 5.0), guidance=2.0)
    both = drive(sampler_of(made)(plan, spaced(2, 5.0), Draws(plan), None))
    assert [s.namespace for s, _ in both] == ["cond", "uncond"] * 6
    rolled = WanConfig(dim=12, ffn_dim=12, layers=1, heads=1, sampler="rolling")
    flying = drive(sampler_of(rolled)(plan, (1000.0, 500.0), Draws(plan), None))
    assert max(len(s.frames) for s, _ in flying) == 2
    for changes in (
        {"sampler": "euler"},
        {"prediction": "noise"},
        {"timesteps": ()},
        {"timesteps": (250.0, 1000.0)},
        {"timesteps": (1000.0, 0.0)},
        {"timesteps": (1000.0,), "sampler": "flow"},
        {"guidance": 3.0},
        {"first_timesteps": (1000.0,), "sampler": "rolling"},
        {"chunk": 0},
        {"fps": 0},
    ):
        with pytest.raises(ValueError, match=r"cannot be sampled|does not go with"):
            WanConfig(**sizes, **changes)


@pytest.mark.parametrize(
    ("frames", "chunk", "context", "short", "text"),
    [
        (0, 3, 0, True, "0 frames with 0 of context leave nothing to generate"),
        (-3, 3, 0, True, "-3 frames with 0 of context leave nothing to generate"),
        (6, 3, 6, True, "give at least 9"),
        (6, 3, -3, True, "leave nothing to generate"),
        (7, 3, 0, False, "7 frames are no multiple of the model's chunk of 3 frames. Use 6 or 9"),
        (7, 3, 2, True, "2 context are no multiple of the model's chunk of 3 frames. Use 3 or 3"),
    ],
)
def test_plans_that_cannot_be_are_refused(frames, chunk, context, short, text):
    with pytest.raises(ValueError, match=text):
        ChunkPlan(frames, chunk, context, short)


def test_rounded_timesteps_have_the_noise_of_the_nearest_entry():
    """Entries of the 1,000-step schedule of shift 8, written out: 1000 * 8 s / (1 + 7 s)."""
    given = torch.tensor([1000.0, 757.0, 522.0, 0.0])
    found = sigma_of(given, 8.0)
    assert found.tolist() == pytest.approx([1.0, 0.7567568, 0.5217391, 0.0], abs=1e-7)
    assert torch.equal(sigma_of(given), given.double() / 1000)
    exact = torch.tensor(warp((1000, 750, 500, 250), 5.0), dtype=torch.float64)
    assert (sigma_of(exact, 5.0) - exact / 1000).abs().max() < 1e-12
    x0, noise = torch.ones(2), torch.full((2,), 3.0)
    assert renoise(x0, noise, 757.0, 8.0).tolist() == pytest.approx([1 + 2 * 0.7567568] * 2)
