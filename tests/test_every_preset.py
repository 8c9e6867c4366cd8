"""Every preset on a tiny Wan, under every sampler: with a short last chunk and a prompt switch."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.models.samplers import spaced
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import preset, presets, sized
from lightning_kv.rollout import rollout
from lightning_kv.testing.candidate import headed

FRAMES, SWITCH = 23, 18  # chunks of three: eight, of which the last has two frames
LEVELS = (1000.0, 750.0, 500.0, 250.0)
TINY = WanConfig(
    dim=48,
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
SAMPLERS = {
    "chunk-wise": {},
    "frame-wise": {"chunk": 1},
    "rolling": {"sampler": "rolling", "timesteps": LEVELS},
    "guided": {"sampler": "flow", "timesteps": spaced(2, 5.0), "guidance": 3.0},
}
NAMES = [
    sized(name, "9f") if name in presets(any_model=True) else name  # a sink of 15 frames
    for name in presets()
    if not preset(name).needs  # tables of a reference rollout: tests/policies/test_oracle.py
]


def encoder(prompts):
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(10 * torch.randn(3, 10, generator=rng))
    return torch.stack(rows)


@cache
def model(sampler):
    torch.manual_seed(0)
    network = CausalWan(replace(TINY, **SAMPLERS[sampler]))
    return VideoModel(network.eval(), None, encoder)


@cache
def rolled(sampler, name, switch):
    """A rollout of two clips of one prompt each, alone or with a switch on the way."""
    events = [Event("prompt_switch", SWITCH, "two dogs")] if switch else []
    own, poses = model(sampler), torch.eye(4).repeat(FRAMES, 1, 1)
    policy = headed(preset(name), own.network.geometry())
    poses[:, 0, 3] = torch.arange(FRAMES) % 7
    prompts = ["a cat", "a fox"]
    return rollout(
        own, policy, prompts, FRAMES, events=events, decode=False, inputs={"pose": poses}
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thinned(17)
def test_a_preset_runs(sampler, name):
    """All of them do, where the sampler commits clean frames; else: test_bad_policies.py."""
    made = rolled(sampler, name, True)
    assert made.latents.isfinite().all()
    full, plain = rolled(sampler, "full", True), rolled(sampler, name, False)
    for own, most in zip(made.costs, full.costs, strict=True):
        assert own.rows_history == most.rows_history
        assert own.rows_read <= most.rows_read
    # what comes later changes nothing before it; with several chunks in flight these are one window
    before = SWITCH if sampler != "rolling" else SWITCH - len(LEVELS) * TINY.chunk
    assert made.latents[:, :before].equal(plain.latents[:, :before])
    assert not made.latents[:, SWITCH:].equal(plain.latents[:, SWITCH:])
