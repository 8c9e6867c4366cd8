"""Precision profiles against a network written out from the published casts."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.session import CacheSession
from lightning_kv.models.precision import PROFILES
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import preset
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
    timesteps=(1000.0, 600.0),
)
GRID = (2, 3)
LEVELS = (1000.0, 2500 / 3, 0.0)


def made(profile="float32"):
    """The same random network each time; gains differ from one, so that their order shows."""
    torch.manual_seed(3)
    network = CausalWan(TINY)
    for name, weight in network.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    return network.cast(profile).eval()


def inputs(dtype):
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2 * 3, 5, 4, 6, generator=rng)
    return x.to(dtype), torch.randn(1, 4, 10, generator=rng)


class Written:
    """The published forward pass in bfloat16: a function of a state dict, lists as cache."""

    def __init__(self, weights):
        self.w, self.past = weights, [([], []) for _ in range(TINY.layers)]

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def rms(self, name, x):
        """Statistics in float32, the quotient back in bfloat16, then the gain."""
        wide = x.float()
        mean = wide.pow(2).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean + 1e-6)).type_as(x) * self.w[f"{name}.weight"]

    def heads(self, x):
        return x.view(*x.shape[:-1], TINY.heads, -1)

    def turn(self, x, frames):
        """Complex numbers of 128 bits; a table of angles per axis, 8 real dimensions each."""
        pairs = torch.view_as_complex(x.to(torch.float64).reshape(*x.shape[:-1], -1, 2))
        series = 1.0 / torch.pow(torch.tensor(10000.0).double(), torch.arange(0, 8, 2).double() / 8)
        rows = []
        for frame in frames:
            for h in range(GRID[0]):
                for w in range(GRID[1]):
                    rows.append(torch.cat([frame * series, h * series, w * series]))
        angles = torch.stack(rows).unsqueeze(1)  # [T, 1, D / 2]
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def attend(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def text(self, states):
        padded = torch.cat([states, states.new_zeros(1, 7 - states.shape[1], 10)], 1).bfloat16()
        hidden = F.gelu(self.linear("text_embedding.0", padded), approximate="tanh")
        return self.linear("text_embedding.2", hidden)

    def time(self, timesteps):
        half = torch.arange(128).to(torch.float64)
        t = torch.tensor(timesteps).to(torch.float64)  # the levels reach the model in float32
        angles = torch.outer(t, torch.pow(10000, -half.div(128)))
        embedding = torch.cat([torch.cos(angles), torch.sin(angles)], 1).bfloat16().unsqueeze(0)
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", embedding)))
        return e, self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, 48))

    def norm(self, x):
        return F.layer_norm(x, (48,), None, None, 1e-6)

    def block(self, index, x, e0, text, frames, commit):
        name = f"blocks.{index}"
        count = len(frames)
        e = (self.w[f"{name}.modulation"].unsqueeze(1) + e0).chunk(6, dim=2)  # [1, F, 1, dim]

        def per_frame(y):
            return y.unflatten(1, (count, -1))

        y = (per_frame(self.norm(x)) * (1 + e[1]) + e[0]).flatten(1, 2)
        own = f"{name}.self_attn"
        q = self.heads(self.rms(f"{own}.norm_q", self.linear(f"{own}.q", y)))
        k = self.heads(self.rms(f"{own}.norm_k", self.linear(f"{own}.k", y)))
        v = self.heads(self.linear(f"{own}.v", y))
        q, k = self.turn(q, frames), self.turn(k, frames)
        keys, values = self.past[index]
        y = self.attend(q, torch.cat([*keys, k], 1), torch.cat([*values, v], 1))
        if commit:
            keys.append(k)
            values.append(v)
        x = x + (per_frame(self.linear(f"{own}.o", y)) * e[2]).flatten(1, 2)
        other = f"{name}.cross_attn"
        y = F.layer_norm(
            x, (48,), self.w[f"{name}.norm3.weight"], self.w[f"{name}.norm3.bias"], 1e-6
        )
        q = self.heads(self.rms(f"{other}.norm_q", self.linear(f"{other}.q", y)))
        k = self.heads(self.rms(f"{other}.norm_k", self.linear(f"{other}.k", text)))
        v = self.heads(self.linear(f"{other}.v", text))
        x = x + self.linear(f"{other}.o", self.attend(q, k, v))
        y = (per_frame(self.norm(x)) * (1 + e[4]) + e[3]).flatten(1, 2)
        y = self.linear(
            f"{name}.ffn.2", F.gelu(self.linear(f"{name}.ffn.0", y), approximate="tanh")
        )
        return x + (per_frame(y) * e[5]).flatten(1, 2)

    def forward(self, x, timesteps, states, frames, commit=False):
        """Velocity of latents ``[1, F, C, H, W]``."""
        weight, bias = self.w["patch_embedding.weight"], self.w["patch_embedding.bias"]
        tokens = F.conv3d(x.permute(0, 2, 1, 3, 4), weight, bias, stride=(1, 2, 2))
        tokens = tokens.flatten(2).transpose(1, 2)
        e, e0 = self.time(timesteps)
        text = self.text(states)
        for index in range(TINY.layers):
            tokens = self.block(index, tokens, e0, text, frames, commit)
        shift, scale = (self.w["head.modulation"].unsqueeze(1) + e.unsqueeze(2)).chunk(2, dim=2)
        y = self.norm(tokens).unflatten(1, (len(frames), -1)) * (1 + scale) + shift
        y = self.linear("head.head", y)  # [1, F, n, 1 * 2 * 2 * C]
        y = y.view(1, len(frames), *GRID, 2, 2, 5)
        return torch.einsum("bfhwpqc->bfchpwq", y).reshape(1, len(frames), 5, 4, 6)

    def x0(self, x, velocity, timesteps):
        sigma = (torch.tensor(timesteps).double() / 1000).view(1, -1, 1, 1, 1)
        return (x.double() - sigma * velocity.double()).type_as(x)


@torch.no_grad()
def three_passes(network, backend="sdpa"):
    """A chunk at mixed levels, its commit, and the next chunk that reads it: velocities and x0."""
    x, states = inputs(network.patch_embedding.weight.dtype)
    session = CacheSession(network.geometry(), preset("full"), (0,), backend)
    text = network.prepare(states)
    out = []
    for frames, levels, final in passes():
        step = Pass("commit" if final else "denoise", frames, levels, 0, final=final, opens=True)
        part, t = x[:, list(frames)], torch.tensor([levels])
        velocity = network(part, t, text, session, step)
        session.finish(step)
        out += [velocity, network.x0(velocity, part, t).to(part.dtype)]
    return out, session


def passes():
    first, second = (0, 1, 2), (3, 4, 5)
    return [(first, LEVELS, ()), (first, (0.0,) * 3, first), (second, LEVELS[1:2] * 3, ())]


def unlike(found, wanted):
    """Share of numbers that differ. Two ways to compute one sum may round to two neighbours in
    bfloat16, in a token or two; another cast moves half of all numbers."""
    assert found.dtype == wanted.dtype
    return (found != wanted).double().mean()


@torch.no_grad()
def test_reference_makes_the_casts_of_the_originals():
    network = made("reference")
    written = Written(dict(network.state_dict()))
    x, states = inputs(torch.bfloat16)
    found, _ = three_passes(network)
    for index, (frames, levels, final) in enumerate(passes()):
        part = x[:, list(frames)]
        velocity = written.forward(part, levels, states, frames, bool(final))
        assert velocity.dtype == torch.bfloat16
        clean = written.x0(part, velocity, levels)
        for ours, theirs in ((found[2 * index], velocity), (found[2 * index + 1], clean)):
            assert unlike(ours, theirs) < 0.1
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("change", ["gain", "turn"])
@torch.no_grad()
def test_the_share_of_unlike_numbers_tells_other_casts_apart(change, monkeypatch):
    """So that the test above would notice: a gain in float32, a rotation in bfloat16."""

    def gain(self, name, x):
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * self.w[f"{name}.weight"].float()).type_as(x)

    def turn(self, x, frames):
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        exact = torch.view_as_complex(torch.stack([torch.ones(12), torch.zeros(12)], -1))
        angle = Written.plain(self, exact.expand(1, len(frames) * 6, 1, 12), frames)
        cos, sin = (y.bfloat16() for y in (angle.real, angle.imag))
        even, odd = pairs.bfloat16().unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def plain(self, ones, frames):
        return torch.view_as_complex(
            original(
                self, torch.view_as_real(ones.to(torch.complex64)).flatten(-2), frames
            ).unflatten(-1, (-1, 2))
        )

    original = Written.turn
    monkeypatch.setattr(Written, "plain", plain, raising=False)
    monkeypatch.setattr(Written, {"gain": "rms", "turn": "turn"}[change], locals()[change])
    network = made("reference")
    x, states = inputs(torch.bfloat16)
    frames, levels, _ = passes()[0]
    other = Written(dict(network.state_dict())).forward(x[:, :3], levels, states, frames)
    assert unlike(three_passes(network)[0][0], other) > 0.3


@torch.no_grad()
def test_profiles_are_close_and_ordered():
    exact, _ = three_passes(made().double(), "reference")
    error = {}
    for name in PROFILES:
        found, _ = three_passes(made(name))
        pairs = list(zip(found, exact, strict=True))
        error[name] = max(float((a.double() - b).abs().max()) for a, b in pairs)
        assert all(a.dtype == PROFILES[name].dtype for a in found)
    scale = max(float(b.abs().max()) for b in exact)
    assert error["float32"] < 2e-6 * scale
    assert 1e-4 * scale < error["reference"] < 0.03 * scale
    assert 1e-4 * scale < error["fast"] < 0.03 * scale
    fast, reference = three_passes(made("fast"))[0], three_passes(made("reference"))[0]
    assert any(not torch.equal(a, b) for a, b in zip(fast, reference, strict=True))


@torch.no_grad()
def test_clean_estimates_are_formed_wide():
    """Where latents and noise nearly cancel, a product in bfloat16 would miss."""
    network = made("reference")
    x = torch.full((1, 1, 5, 4, 6), 1.0078125).bfloat16()
    velocity = torch.full_like(x, 1.2109375)
    t = torch.tensor([[2500 / 3]])
    wide = network.x0(velocity, x, t)
    assert wide.dtype == torch.float64  # samplers cast it, those with guidance after combining
    found = float(wide.bfloat16().flatten()[0])
    want = 1.0078125 - float(t) / 1000 * 1.2109375
    assert found == float(torch.tensor(want, dtype=torch.float64).bfloat16())
    narrow = x - (t / 1000).bfloat16().view(1, 1, 1, 1, 1) * velocity
    assert found != float(narrow.flatten()[0])


def test_keys_turn_in_the_precision_of_the_profile():
    """A rotation in float32 rounds a few of many numbers to another bfloat16."""
    shape, first = (1, 3 * 32 * 32, TINY.heads, 24), 1000
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    frames = tuple(range(first, first + 3))
    step = Pass("commit", frames, (0.0,) * 3, 0, final=frames)
    found = {}
    for name in ("reference", "fast"):
        session = CacheSession(made(name).geometry((64, 64)), preset("full"))
        for layer in range(TINY.layers):
            session.attend(layer, q, k, v, step)
        session.finish(step)
        found[name] = session.samples[0].stores["cond"][0].memory.groups[0].payload("k")
    token = torch.arange(3 * 1024)
    series = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    axes = (first + token // 1024, token % 1024 // 32, token % 32)
    angles = torch.cat([axis.double().outer(series) for axis in axes], 1).unsqueeze(1)
    pairs = torch.view_as_complex(k[0].double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    want = torch.view_as_real(turned).flatten(-2).bfloat16().transpose(0, 1)
    assert unlike(found["reference"], want) < 1e-5 < unlike(found["fast"], want) < 1e-3


@pytest.mark.parametrize("name", PROFILES)
def test_cast_returns_itself_and_may_be_repeated(name):
    network = made()
    assert network.cast(name) is network
    once = {k: v.clone() for k, v in network.state_dict().items()}
    assert network.cast(name) is network
    assert all(torch.equal(v, once[k]) for k, v in network.state_dict().items())
    assert {v.dtype for v in once.values()} == {PROFILES[name].dtype}
    assert network.geometry().element_size == {"float32": 4, "reference": 2, "fast": 2}[name]
    assert network.geometry().rotary.work == PROFILES[name].rotary


def test_a_profile_can_be_left_again():
    network = made("fast").cast("reference")
    for a, b in zip(three_passes(network)[0], three_passes(made("reference"))[0], strict=True):
        assert torch.equal(a, b)


def test_unknown_profiles_are_refused():
    with pytest.raises(ValueError, match=r"No precision profile 'half'. Profiles: float32, ref"):
        made("half")


@pytest.mark.parametrize(("name", "size"), [("float32", 4), ("reference", 2), ("fast", 2)])
def test_a_session_holds_the_bytes_of_its_profile(name, size):
    model = VideoModel(made(name), None, lambda p: torch.zeros(len(p), 3, 10))
    out = rollout(model, preset("full"), "a", 9, decode=False)
    assert out.latents.dtype == PROFILES[name].dtype
    assert bool(out.latents.isfinite().all())
    tokens = math.prod(GRID)
    rows = 9 * tokens
    numbers = 2 * TINY.layers * TINY.dim * rows * size
    fields = 20 * TINY.layers * rows  # five numbers of four bytes, held once for both heads
    assert out.session.held_bytes(0) == numbers + fields
    for store in out.session.samples[0].stores["cond"]:
        for group in store.memory.groups:
            assert {x.dtype for s in group.segments for x in s.rows.values()} == {
                PROFILES[name].dtype
            }
