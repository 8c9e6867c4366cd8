"""Tables of a dense cache over given latents, against one attention over the whole clip at once."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
from tiny_network import TINY

from lightning_kv import preset, rollout
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.rotary import rotate
from lightning_kv.distillation.shadow import shadow_tables
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan

CHUNKS, CHUNK, TOKENS, HEADS = 4, 3, 3, 2
FRAMES = CHUNKS * CHUNK


def encoder(prompts):
    """Other states for every prompt."""
    rngs = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    return torch.stack([10 * torch.randn(3, 10, generator=rng).double() for rng in rngs])


def tiny(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CausalWan(replace(TINY, **changes)).double().eval()
        for name, own in network.named_parameters():
            if name.endswith("norm_q.weight"):
                own.data.mul_(4)  # heads that look at some frames more than at others
    return VideoModel(network.requires_grad_(False), None, encoder)


def clip(seed=1):
    return torch.randn(FRAMES, 1, 2, 6, generator=torch.Generator().manual_seed(seed)).double()


class AllAtOnce:
    """Stands in for a session: a softmax over the whole clip, where chunks do not see later ones.

    Attributes:
        softmax: Of each layer, ``[H, T, T]`` over all tokens of the clip.
        values: ``[H, T, D]`` of each layer.
    """

    def __init__(self, geometry):
        self.geometry, self.softmax, self.values = geometry, [], []

    def attend(self, layer, q, k, v, step):
        own, count = self.geometry, len(step.frames)
        time = torch.arange(count).repeat_interleave(own.tokens)
        places = own.places().repeat(count, 1)
        angles = own.rotary.angles(time, *places.unbind(-1))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        q, k = (rotate(x, angles, torch.float64) for x in (q, k))
        chunk = time // CHUNK
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        logits = logits.masked_fill(chunk > chunk.unsqueeze(1), -torch.inf)
        self.softmax.append(logits.softmax(-1))
        self.values.append(v)
        return (self.softmax[-1] @ v).transpose(0, 1).unsqueeze(0)


def at_once(model, latents):
    network, frames = model.network, tuple(range(len(latents)))
    seen = AllAtOnce(network.geometry())
    step = Pass("prefill", frames, (0.0,) * len(frames), 0)
    text = network.prepare(model.encoder(["a"]))
    with torch.no_grad():
        network(latents.unsqueeze(0), torch.zeros(1, len(frames)).double(), text, seen, step)
    return seen


def by_frame(rows):
    return rows.unflatten(-1, (FRAMES, -1)).sum(-1)


def test_mass_is_that_of_a_dense_attention():
    model, latents = tiny(), clip()
    dense = at_once(model, latents)
    found = shadow_tables(model, latents, "k", "a", {"mass": {}})
    assert [*found] == ["mass"]
    mass = found["mass"].mass["cond"]
    assert mass.shape == (CHUNKS, 3, HEADS, FRAMES)
    for layer, softmax in enumerate(dense.softmax):
        expected = by_frame(softmax).unflatten(1, (CHUNKS, -1)).mean(2).transpose(0, 1)
        torch.testing.assert_close(mass[:, layer].double(), expected, atol=1e-6, rtol=0)
        assert float(expected[-1].max() - expected[-1].min()) > 0.1
    own = found["mass"].clip
    assert (own.key, own.prompt, own.frames, own.chunks) == ("k", "a", FRAMES, CHUNKS)


@pytest.mark.parametrize("queries", [2, 9])
def test_outputs_are_those_of_a_dense_attention(queries):
    """Of some queries of a chunk, or all, any set of frames, by a masked softmax."""
    model, latents = tiny(), clip()
    dense = at_once(model, latents)
    table = shadow_tables(model, latents, "k", "a", {"outputs": {"queries": queries}})["outputs"]
    rng, count = torch.Generator().manual_seed(0), CHUNK * TOKENS
    later = 2 * count // (queries * 3)  # as in the last of the model's three passes of a chunk
    chosen = [(r * count // queries + later) % count for r in range(queries)]
    for (namespace, chunk, layer), own in table.outputs.items():
        frames = (chunk + 1) * CHUNK
        assert namespace == "cond" and own.frames == tuple(range(frames))
        assert own.weight.tolist() == [1.0] * queries
        values = dense.values[layer][:, : frames * TOKENS]
        for e, row in enumerate(chosen):
            softmax = dense.softmax[layer][:, chunk * count + row, : frames * TOKENS]
            torch.testing.assert_close(
                own.share[:, e].double(), softmax.unflatten(1, (frames, -1)).sum(-1)
            )
            some = torch.rand(frames, generator=rng) < 0.5
            some[-1] = True
            left = softmax * some.repeat_interleave(TOKENS)
            expected = torch.einsum("hn,hnd->hd", left / left.sum(-1, keepdim=True), values)
            whole = torch.einsum("hn,hnd->hd", softmax, values)
            moved = own.pull[:, e, some].sum(1) / own.share[:, e, some].sum(1, keepdim=True)
            torch.testing.assert_close(moved.double(), expected - whole, atol=1e-5, rtol=1e-4)
    assert len(table.outputs) == CHUNKS * 3


def test_a_short_last_chunk_is_one_too():
    model, latents = tiny(), clip()[:-1]
    dense = at_once(model, latents)
    mass = shadow_tables(model, latents, "k", "a", {"mass": {}})["mass"].mass["cond"]
    for layer, softmax in enumerate(dense.softmax):
        expected = softmax[:, 3 * CHUNK * TOKENS :].unflatten(2, (FRAMES - 1, -1)).sum(-1).mean(1)
        torch.testing.assert_close(mass[3, layer].double(), expected, atol=1e-6, rtol=0)


ROLLOUTS = {
    "plain": ({}, {}),
    "given frames": ({}, {"context": clip(2)[: 2 * CHUNK].unsqueeze(0)}),
    "a switch": ({}, {"events": [Event("prompt_switch", 2 * CHUNK, "b")]}),
    "guidance": (
        {"sampler": "flow", "guidance": 3.0, "timesteps": (900.0, 500.0)},
        {"negative": "b", "events": [Event("prompt_switch", 2 * CHUNK, "c")]},
    ),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_they_are_what_the_commit_passes_of_a_full_rollout_saw(name):
    changes, settings = ROLLOUTS[name]
    model, seen = tiny(**changes), {}

    def watch(view):
        if view.step.final:
            mass = torch.cat(view.attention(), -1)[:, 0].unflatten(1, (-1, TOKENS)).sum(-1)
            seen[view.step.namespace, view.step.chunk, view.layer] = mass / view.query.shape[1]

    about = {"keys": ["k"], "record": "mass", "decode": False, **settings}
    made = rollout(model, preset("full"), "a", FRAMES, watch=watch, **about)
    found = shadow_tables(model, made.latents[0], "k", "a", {"mass": {}}, **settings)["mass"]
    theirs = made.tables["mass"][0]
    assert found.clip == theirs.clip and found.mass.keys() == theirs.mass.keys()
    assert len(seen) == len(found.mass) * CHUNKS * 3
    for (namespace, chunk, layer), line in seen.items():
        mine = found.mass[namespace][chunk, layer, :, : line.shape[1]]
        torch.testing.assert_close(mine.double(), line.double(), atol=1e-6, rtol=0)
    differ = found.mass["cond"][3] - theirs.mass["cond"][3]
    assert float(differ.abs().max()) > 1e-3, "noisy passes look elsewhere"


def test_the_policy_that_led_there_makes_no_difference():
    """Latents of a window: their shadow holds what the window had dropped."""
    model = tiny()
    made = rollout(model, preset("sliding-window@3f"), "a", FRAMES, keys=["k"], decode=False)
    mass = shadow_tables(model, made.latents[0], "k", "a", {"mass": {}})["mass"].mass["cond"]
    dense = at_once(model, made.latents[0])
    for layer, softmax in enumerate(dense.softmax):
        expected = by_frame(softmax)[:, -CHUNK * TOKENS :].mean(1)
        torch.testing.assert_close(mass[-1, layer].double(), expected, atol=1e-6, rtol=0)
        assert float(expected[:, :CHUNK].min()) > 0
