"""The network: keys and sizes of the published one, and a cache that changes nothing."""

import pytest
import torch

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.models import CausalWan, WanConfig, build_model
from lightning_kv.models.codec import PatchCodec, PhraseEncoder
from lightning_kv.models.samplers import ChunkPlan, few_step, renoise, warp
from lightning_kv.policies.registry import preset
from lightning_kv.tasks.training.teacher_forcing import ForcingSession

TINY = WanConfig(
    dim=48,
    ffn_dim=96,
    layers=3,
    heads=2,
    patch=(1, 2, 2),
    text_dim=10,
    text_len=7,
    latent_size=(4, 6),
    channels=5,
)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return CausalWan(TINY).double()


def published_shapes(dim, ffn, layers):
    """Keys and shapes of the original state dict, written out."""
    shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.0.bias": (dim,),
        "text_embedding.2.weight": (dim, dim),
        "text_embedding.2.bias": (dim,),
        "time_embedding.0.weight": (dim, 256),
        "time_embedding.0.bias": (dim,),
        "time_embedding.2.weight": (dim, dim),
        "time_embedding.2.bias": (dim,),
        "time_projection.1.weight": (6 * dim, dim),
        "time_projection.1.bias": (6 * dim,),
        "head.modulation": (1, 2, dim),
        "head.head.weight": (64, dim),
        "head.head.bias": (64,),
    }
    for b in range(layers):
        block = f"blocks.{b}."
        shapes[block + "modulation"] = (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for linear in "qkvo":
                shapes[f"{block}{attention}.{linear}.weight"] = (dim, dim)
                shapes[f"{block}{attention}.{linear}.bias"] = (dim,)
            for norm in "qk":
                shapes[f"{block}{attention}.norm_{norm}.weight"] = (dim,)
        shapes |= {
            block + "norm3.weight": (dim,),
            block + "norm3.bias": (dim,),
            block + "ffn.0.weight": (ffn, dim),
            block + "ffn.0.bias": (ffn,),
            block + "ffn.2.weight": (dim, ffn),
            block + "ffn.2.bias": (dim,),
        }
    return shapes


@pytest.mark.parametrize(
    ("name", "sizes"), [("wan-1.3b", (1536, 8960, 30)), ("wan-14b", (5120, 13824, 40))]
)
def test_keys_and_shapes_are_the_published_ones(name, sizes):
    model = build_model(name, "meta")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published_shapes(*sizes)
    if name == "wan-1.3b":
        assert len(model.state_dict()) == 825
        assert sum(p.numel() for p in model.parameters()) == 1_418_996_800


def inputs(frames, batch=2):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, frames, 5, 4, 6, generator=rng, dtype=torch.float64)
    text = torch.randn(batch, 4, 10, generator=rng, dtype=torch.float64)
    return x, text, 1000 * torch.rand(batch, frames, generator=rng, dtype=torch.float64)


class BlockCausal:
    """One pass over the whole sequence under a block-causal mask."""

    def __init__(self, chunk):
        self.chunk = chunk

    def attend(self, layer, q, k, v, step):
        frames, tokens = len(step.frames), q.shape[1] // len(step.frames)
        rows, columns = TINY.geometry().grid
        index = torch.arange(q.shape[1])
        place = index % tokens
        angles = TINY.rotary.angles(index // tokens, place // columns, place % columns)
        turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
            ).flatten(-2)
            for x in (q, k)
        )
        chunk = index // (tokens * self.chunk)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(chunk[:, None] < chunk[None, :], -torch.inf)
        assert rows * columns * frames == q.shape[1]
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_chunks_with_a_cache_equal_one_masked_pass(tiny, chunk, batch):
    frames = 6
    x, text, t = inputs(frames, batch)
    context = tiny.prepare(text)
    ids = tuple(range(frames))
    whole = tiny(x, t, context, BlockCausal(chunk), Pass("commit", ids, (0.0,) * frames, 0))
    session = CacheSession(TINY.geometry(), preset("full"), range(batch))
    parts = []
    for low in range(0, frames, chunk):
        own = ids[low : low + chunk]
        step = Pass("commit", own, (0.0,) * chunk, low // chunk, final=own, opens=True)
        span = slice(low, low + chunk)
        parts.append(tiny(x[:, span], t[:, span], context, session, step))
        session.finish(step)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


@torch.no_grad()
def test_the_training_session_reads_what_the_cache_would(tiny):
    """Teacher forcing equals a rollout whose history is the clean sequence."""
    frames, chunk = 6, 2
    clean, text, t = inputs(frames)
    noisy = torch.randn_like(clean)
    context = tiny.prepare(text)
    ids = tuple(range(frames))
    forcing = ForcingSession(TINY.geometry(), chunk, [list(range(i)) for i in range(3)])
    forcing.trig = exact_trig(frames)  # the session's own are float32
    zero = torch.zeros_like(t)
    tiny(clean, zero, context, forcing, Pass("commit", ids, (0.0,) * frames, 0))
    trained = tiny(noisy, t, context, forcing, Pass("denoise", ids, (0.0,) * frames, 0))
    session = CacheSession(TINY.geometry(), preset("full"), (0, 1))
    for low in range(0, frames, chunk):
        own, span = ids[low : low + chunk], slice(low, low + chunk)
        step = Pass("denoise", own, (1.0,) * chunk, low // chunk, opens=True)
        out = tiny(noisy[:, span], t[:, span], context, session, step)
        session.finish(step)
        torch.testing.assert_close(out, trained[:, span], atol=1e-9, rtol=0)
        commit = Pass("commit", own, (0.0,) * chunk, low // chunk, final=own)
        tiny(clean[:, span], zero[:, span], context, session, commit)
        session.finish(commit)


def exact_trig(frames):
    rows, columns = TINY.geometry().grid
    index = torch.arange(frames * rows * columns)
    place = index % (rows * columns)
    angles = TINY.rotary.angles(index // (rows * columns), place // columns, place % columns)
    return angles.cos(), angles.sin()


def test_each_frame_has_its_own_timestep(tiny):
    x, text, t = inputs(4, 1)
    context = tiny.prepare(text)
    step = Pass("denoise", (0, 1, 2, 3), (0.0,) * 4, 0)
    out = tiny(x, t, context, BlockCausal(1), step)
    other = t.clone()
    other[:, 2] += 100
    changed = (tiny(x, other, context, BlockCausal(1), step) - out).abs().amax((0, 2, 3, 4))
    assert changed[:2].max() == 0
    assert changed[2] > 1e-6


def test_text_is_padded_and_the_padding_counts(tiny):
    x, text, t = inputs(2, 1)
    step = Pass("denoise", (0, 1), (0.0,) * 2, 0)
    short = tiny(x, t, tiny.prepare(text), BlockCausal(2), step)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 3))
    torch.testing.assert_close(short, tiny(x, t, tiny.prepare(padded), BlockCausal(2), step))
    cut = tiny(
        x, t, [(k[:, :, :4], v[:, :, :4]) for k, v in tiny.prepare(text)], BlockCausal(2), step
    )
    assert (short - cut).abs().max() > 1e-6
    with pytest.raises(ValueError, match=r"at most 7, 10"):
        tiny.prepare(torch.zeros(1, 8, 10))


def test_velocity_becomes_a_clean_estimate(tiny):
    x0, noise = torch.randn(2, 1, 3, 5, 4, 6, dtype=torch.float64)
    t = torch.tensor([[900.0, 500.0, 30.0]])
    sigma = (t / 1000).view(1, 3, 1, 1, 1)
    x = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(tiny.x0(noise - x0, x, t), x0)


# -- samplers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        ((1000, 750, 500, 250), 5, (1000, 937.5, 833.33, 625)),
        ((1000, 800, 600, 400, 200), 5, (1000, 952.38, 882.35, 769.23, 555.56)),
        ((1000, 750, 500, 250), 8, (1000, 960, 888.89, 727.27)),
    ],
)
def test_warped_schedules(steps, shift, expected):
    assert warp(steps, shift) == pytest.approx(expected, abs=0.01)


def test_few_step_asks_for_the_right_passes():
    plan = ChunkPlan(9, 3, 3)
    shape = (1, 3, 2, 2, 2)
    given = torch.full(shape, 7.0)
    asked = []

    def noise(chunk, step):
        return torch.full(shape, 100.0 * chunk + step)

    steps = few_step(plan, (1000.0, 500.0), noise, given)
    estimate = None
    while True:
        try:
            step, x = steps.send(estimate)
        except StopIteration:
            break
        asked.append(
            (
                step.phase,
                step.frames,
                step.timesteps[0],
                step.opens,
                step.final,
                step.next_chunk,
                float(x.mean()),
            )
        )
        estimate = torch.full(shape, 10.0 * step.chunk + step.step)
    first, second = (3, 4, 5), (6, 7, 8)
    assert asked == [
        ("prefill", (0, 1, 2), 0.0, True, (0, 1, 2), 3, 7.0),
        ("denoise", first, 1000.0, True, (), 3, 100.0),
        ("denoise", first, 500.0, False, (), 3, 0.5 * 10.0 + 0.5 * 101.0),
        ("commit", first, 0.0, False, first, 3, 11.0),
        ("denoise", second, 1000.0, True, (), 0, 200.0),
        ("denoise", second, 500.0, False, (), 0, 0.5 * 20.0 + 0.5 * 201.0),
        ("commit", second, 0.0, False, second, 0, 21.0),
    ]
    torch.testing.assert_close(renoise(given, given * 0, 250.0), 0.75 * given)


# -- codec and text --------------------------------------------------------------------------


def test_codec_is_exact_with_all_components():
    rng = torch.Generator().manual_seed(0)
    codec = PatchCodec.fit(torch.rand(500, 3, 8, 8, generator=rng), 192)
    pixels = torch.rand(2, 4, 3, 32, 24, generator=rng)
    latents = codec.encode(pixels)
    assert latents.shape == (2, 4, 192, 4, 3)
    torch.testing.assert_close(codec.decode(latents), pixels, atol=1e-4, rtol=0)
    patch = pixels[1, 2, :, 8:16, 16:24].flatten()
    slow = ((patch - codec.mean) @ codec.basis) / codec.scale
    torch.testing.assert_close(latents[1, 2, :, 1, 2], slow, atol=1e-4, rtol=0)


def test_phrases_win_over_words_and_unknown_words_are_said():
    encoder = PhraseEncoder(["a", "b", "a b"], torch.tensor([[1.0], [2.0], [3.0]]))
    assert encoder(["a b", "b a"]).flatten().tolist() == [1, 3, 2, 1]
    with pytest.raises(ValueError, match=r"does not know \['c'\] in 'a c'. It knows: a, b"):
        encoder(["a c"])
    with pytest.raises(ValueError, match="different length"):
        encoder(["a", "a b"])
