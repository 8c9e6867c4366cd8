"""Long rollouts of a small network of the real kind: memory, far positions, same numbers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_kv.cache.rotary import Rotary
from lightning_kv.models.samplers import warp
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout

TINY = WanConfig(
    dim=48,
    ffn_dim=96,
    layers=2,
    heads=2,
    channels=5,
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    train_horizon=6,
)
TOKENS = 6
KINDS = {
    "frame-wise": {"chunk": 1, "timesteps": (1000.0, 2500 / 3)},
    "chunk-wise": {},
    "rolling": {"sampler": "rolling", "timesteps": warp((1000, 800, 600, 400, 200), 5.0)},
}
PROMPTS = ["a cat on a mat", "two dogs", "three geese at dawn"]


def encoder(prompts):
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(torch.randn(3, 10, generator=rng))
    return torch.stack(rows)


def model(kind="chunk-wise", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    network = CausalWan(replace(TINY, **KINDS[kind], **changes)).to(dtype)
    return VideoModel(network.eval(), None, encoder)


def window(budget, sink=0, **others):
    part = {"part": "window", "sink": sink, "budget": budget}
    return policy_from_dict({"name": "w", "retain": part, **others})


def run(made, policy, prompts, frames, **options):
    return rollout(made, policy, prompts, frames, decode=False, **options)


# -- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["absolute", "contiguous", "clamp"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_as_it_is_past_the_trained_length(kind, positions):
    made = model(kind)
    chunk = made.network.config.chunk
    frames = 3 * TINY.train_horizon if chunk == 1 else 36
    out = run(made, window("6f", 3, positions=positions), PROMPTS[0], frames)
    assert out.latents.shape == (1, frames, 5, 4, 6)
    assert bool(out.latents.isfinite().all())
    assert 0.1 < float(out.latents.abs().max()) < 100
    held = out.costs[0].chunk_bytes
    assert len(held) == frames // chunk
    numbers = 2 * TINY.layers * TOKENS * TINY.dim * 4  # of one frame, keys and values
    fields = 20 * TINY.layers * TOKENS
    flight = [chunk] * len(held)
    if kind == "rolling":  # first alone; then there is room for as many as are ever in flight
        flight = [3, *[15] * (len(held) - 1)]
    for index, found in enumerate(held):
        history = min(6, chunk * index)
        assert found == (history + flight[index]) * numbers + history * fields
    buffer = (6 + max(flight)) * numbers // 2 // TINY.layers  # keys of one layer, turned
    plans = 6 * TINY.layers * TOKENS * 4 * 4  # a row's lag, time, row and column
    around = 0 if positions == "absolute" else buffer + plans
    assert out.costs[0].peak_bytes == max(held) + around


def test_a_budget_in_bytes_holds_chunk_by_chunk():
    made = model()
    limit = 9 * made.network.geometry().frame_bytes
    assert run(made, window(f"{limit}B"), PROMPTS[0], 18).costs[0].peak_bytes <= limit


def test_a_budget_in_bytes_holds_with_chunks_in_flight():
    made = model("rolling")
    limit = 24 * made.network.geometry().frame_bytes
    assert run(made, window(f"{limit}B"), PROMPTS[0], 48).costs[0].peak_bytes <= limit


# -- far positions ---------------------------------------------------------------------------


@pytest.mark.slow
def test_eleven_hundred_frames_go_by():
    """The originals end at 1024 frames, where their table of angles does."""
    made = model("frame-wise", layers=1, dim=12, ffn_dim=12, heads=1, latent_size=(2, 2))
    made.network.config = replace(made.network.config, timesteps=(1000.0,))
    times = {}

    def watch(view):
        if view.step.phase == "commit":
            times[view.step.start] = view.time[0].tolist()
            # 12 numbers in a head: two pairs turn with time, the others with a place of (0, 0)
            angles = torch.tensor([view.step.start, view.step.start / 100, 0, 0, 0, 0]).double()
            pairs = torch.view_as_complex(view.raw_query.double().unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2).float()
            torch.testing.assert_close(view.query, turned, atol=1e-5, rtol=0)

    shape = (5, 2, 2)
    repeat = {key: torch.randn(1, 1, *shape) for key in range(4)}
    out = run(
        made,
        window("3f"),
        PROMPTS[0],
        1100,
        noise=lambda chunk, step: repeat[chunk % 4],
        watch=watch,
    )
    assert bool(out.latents.isfinite().all())
    assert times[1099] == [1096, 1097, 1098]
    # Noise repeats every four frames and so do, before long, the latents: only distances count.
    rounds = out.latents[0, 100:].unflatten(0, (-1, 4))
    torch.testing.assert_close(rounds, rounds[:1].expand_as(rounds), atol=1e-4, rtol=0)
    assert (rounds[0, 0] - rounds[0, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("start", [0, 1021, 5000])
def test_angles_far_out_are_exact(start):
    found = Rotary(24).angles(*(torch.tensor([x]) for x in (start, 1, 2)))[0]
    wanted = [x * 10000.0 ** (-2 * i / 8) for x in (start, 1, 2) for i in range(4)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


# -- same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_a_batch_change_nothing(kind):
    made = model(kind, torch.float64)
    together = run(made, window("6f", 3), PROMPTS, 18)
    for index, prompt in enumerate(PROMPTS):
        one = run(made, window("6f", 3), prompt, 18)
        assert (together.latents[index] - one.latents[0]).abs().max() <= 1e-9
        assert together.costs[index] == one.costs[0]
    made = model(kind)
    batch, one = (run(made, window("6f", 3), p, 18).latents[0] for p in (PROMPTS, PROMPTS[0]))
    assert (batch - one).abs().max() < 1e-4


SCRIPT = """
import importlib.util, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("again", sys.argv[1])
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)
policy, prompt = own.window("6f", 3), own.PROMPTS[0]
torch.save({k: own.run(own.model(k), policy, prompt, 18).latents for k in own.KINDS}, sys.argv[2])
"""


def test_a_second_process_makes_the_same_latents(tmp_path):
    file = tmp_path / "latents.pt"
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__, str(file)],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"},
    )
    for kind, latents in torch.load(file).items():
        assert torch.equal(latents, run(model(kind), window("6f", 3), PROMPTS[0], 18).latents)


@pytest.mark.parametrize("frames", [7, 8])
@pytest.mark.parametrize("name", ["full", "window"])
def test_a_shorter_rollout_is_the_beginning_of_a_longer_one(name, frames):
    """Whole chunks are the same; a short last chunk has the same noise and less company."""
    policy, made = {"full": preset("full"), "window": window("3f", 1)}[name], model()
    long, short = (run(made, policy, PROMPTS[0], n).latents for n in (12, frames))
    assert short.shape[1] == frames
    assert torch.equal(short[:, :6], long[:, :6])
    assert not torch.equal(short[:, 6:], long[:, 6:frames])
    again = run(made, policy, PROMPTS[0], frames, context=long[:, :6])
    torch.testing.assert_close(again.latents, short, atol=1e-5, rtol=0)


def test_a_rolling_rollout_knows_how_long_it_is():
    """Chunks in flight see each other, so the end of a video reaches back by four chunks."""
    made = model("rolling")
    long, short = (run(made, window("6f"), PROMPTS[0], n).latents for n in (36, 31))
    assert torch.equal(short[:, :18], long[:, :18])
    assert not torch.equal(short[:, 18:30], long[:, 18:30])


# -- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "size", "text"),
    [
        (0, None, "0 frames with 0 of context leave nothing to generate"),
        (-3, None, "-3 frames with 0 of context leave nothing to generate"),
        (9, (5, 6), "Latents of 5 x 6 cannot be cut into patches of 2 x 2. Use 4 x 6"),
        (9, (4, 7), "Latents of 4 x 7 cannot be cut into patches of 2 x 2. Use 4 x 8"),
        (9, (0, 6), "Latents of 0 x 6 cannot be cut into patches of 2 x 2. Use 2 x 6"),
        (9, (-4, 6), "Latents of -4 x 6 cannot be cut"),
    ],
)
def test_sizes_that_cannot_be_are_refused(frames, size, text):
    with pytest.raises(ValueError, match=text):
        run(model(), preset("full"), PROMPTS[0], frames, latent_size=size)


@pytest.mark.parametrize("shape", [(5, 4, 8), (4, 4, 6), (5, 4)])
def test_a_context_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match="context"):
        run(model(), preset("full"), PROMPTS[0], 9, context=torch.zeros(1, 3, *shape))


def test_other_sizes_than_the_trained_one_work():
    out = run(model(), window("3f"), PROMPTS[0], 6, latent_size=(6, 4))
    assert out.latents.shape == (1, 6, 5, 6, 4)
    assert bool(out.latents.isfinite().all())


# -- Rolling Forcing -------------------------------------------------------------------------


def rolled(frames):
    """Per pass: phase, first frame, frames in the query; frames held, read, and where they are."""
    seen = []

    def watch(view):
        assert not view.ragged
        ids = view.frame_id.unique().tolist()
        read, (mask, own) = ids, view.read
        assert list(view.frames) == ids and own is None
        if mask is not None:
            assert bool((mask == mask[:1, :1]).all()), "all heads and queries read the same"
            read = view.frame_id[:, mask[0, 0]].unique().tolist()
        times, lines = {}, (view.heads, -1)
        moved = view.read_time
        assert moved.ndim == 2, "all queries meet the same times"
        for frame, time in zip(
            view.frame_id.expand(lines).flatten().tolist(),
            moved.expand(lines).flatten().tolist(),
            strict=True,
        ):
            times.setdefault(frame, set()).add(time)
        seen.append((view.step, view.layer, ids, read, times))

    policy = preset("rolling-forcing")
    out = run(model("rolling"), policy, PROMPTS[0], frames, watch=watch)
    return out, seen


def test_rolling_forcing_reads_what_shares_the_reach():
    frames = 48
    out, seen = rolled(frames)
    passes = frames // 3 + 4 + frames // 3
    assert len(seen) == TINY.layers * passes
    longest = 0
    for step, _, held, read, times in seen:
        start, queries = step.frames[0], len(step.frames)
        sink = set(range(min(3, start)))
        assert set(held) == sink | set(range(max(0, start - 18), start))
        if step.phase == "denoise":
            newest = range(max(0, start - (21 - queries - 3)), start)
            assert set(read) == sink | set(newest)
            longest = max(longest, len(read) + queries)
        else:
            assert set(read) == set(range(max(0, start - 18), start))
        for frame in read:
            moved = max(0, start + queries - 21) if frame < 3 and step.phase == "denoise" else 0
            assert times[frame] == {frame + moved}
    assert longest == 21
    assert any(max(0, s.frames[0] + len(s.frames) - 21) for s, *_ in seen if s.phase == "denoise")
    for store in out.session.samples[0].stores["cond"]:
        assert len(set(store.memory.lengths)) == 1
        for group in store.memory.groups:
            ids, times = group.meta["frame_id"], group.meta["time"]
            assert all(sorted(set(x.tolist())) == [0, 1, 2, *range(30, 48)] for x in ids)
            assert torch.equal(ids.float().expand_as(times), times)


def test_rolling_forcing_moves_the_keys_of_the_sink():
    """Keys as the queries meet them: the raw ones turned to where the sink is said to be."""
    checked = []

    def watch(view):
        step = view.step
        if step.phase != "denoise" or step.frames[0] != 24 or view.layer != 1:
            return
        raw, (ids,) = view.keys("raw").double(), view.frame_id
        at = torch.where(ids < 3, ids + step.frames[0] + len(step.frames) - 21, ids)
        angles = Rotary(24).angles(at, *view.place[0].unbind(-1))
        pairs = torch.view_as_complex(raw.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        want = torch.view_as_real(turned).flatten(-2).float()
        torch.testing.assert_close(view.keys("read"), want, atol=1e-5, rtol=0)
        checked.append(len(ids))

    run(model("rolling"), preset("rolling-forcing"), PROMPTS[0], 48, watch=watch)
    assert checked == [21 * TOKENS]


@pytest.mark.parametrize(
    ("refresh", "each"),
    [("pass", False), ("pass", True), ("chunk", False), ("chunk", True)],
)
def test_reads_by_attention_work_with_chunks_in_flight(refresh, each):
    select = {"part": "top-attention", "budget": "4f", "refresh": refresh, "per_query_frame": each}
    policy = policy_from_dict({"name": "x", "select": select})
    read = []

    def watch(view):
        if view.selection is not None:
            frames = view.selection.frames
            assert frames.shape[1] in (1, view.query_frames)
            read.append(int(frames.sum(-1).max()))

    out = run(model("rolling"), policy, PROMPTS[0], 30, watch=watch)
    assert set(read) == {4}
    assert bool(out.latents.isfinite().all())
