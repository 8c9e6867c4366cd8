"""A chunk that reads less, against the rollout that reads so and against one head at a time."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_network import TINY, encoder

from lightning_kv.calibration.chunks import chunk_losses
from lightning_kv.calibration.passes import exact_losses, look
from lightning_kv.calibration.scorers import SCORERS
from lightning_kv.models.samplers import ChunkPlan, keyed_noise
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout

FRAMES = 15
SHARES = [[1, 1], [1, 5 / 12], [1, 1]]


def reading(part, **settings):
    return policy_from_dict({"name": "r", "select": {"part": part, **settings}})


def tried(timesteps, do):
    """What ``do`` finds at the first pass of the last chunk, and the final latents."""
    torch.manual_seed(0)
    network = CausalWan(replace(TINY, timesteps=timesteps)).double().eval()
    found = []

    def before(call):
        if call.step.chunk == 4 and call.step.step == 0 and call.step.phase == "denoise":
            noise = keyed_noise(0, ["a"], ChunkPlan(FRAMES, 3), (1, *TINY.latent_size))
            found.append(do(call, noise))

    model = VideoModel(network, None, encoder)
    out = rollout(model, preset("full"), "a", FRAMES, decode=False, before=before)
    return found[0], out.latents


@pytest.mark.parametrize(
    "policy",
    [
        reading("top-attention", budget="4f"),
        reading("random", budget="3f"),
        reading("top-attention", budget={"part": "adaptive", "amount": "4f"}),
        reading("reach", reach=5, sink=0),
    ],
    ids=["top", "random", "adaptive", "reach"],
)
def test_a_chunk_that_reads_less_is_the_one_of_a_rollout_that_does_from_there_on(policy):
    plain, latents = tried((1000.0, 600.0), lambda call, noise: None)
    assert plain is None

    def switched(call, noise):
        loss = chunk_losses(call, noise, {"own": policy.select})["own"]
        call.session.policy = policy  # the rest of the rollout, this chunk alone, reads so
        for own in call.session.samples:
            own.policy = policy
            own.states["cond"]["select"] = {"budget": {}}
        return loss

    loss, moved = tried((1000.0, 600.0), switched)
    change = (moved - latents)[:, 12:].norm() / latents[:, 12:].norm()
    assert loss == pytest.approx(float(change), rel=1e-8) and loss > 1e-5


def test_all_frames_cost_nothing():
    parts = {"all": preset("full").select, "top": reading("top-attention", budget="12f").select}
    losses, _ = tried((1000.0, 600.0), lambda call, noise: chunk_losses(call, noise, parts))
    assert max(losses.values()) < 1e-12


def test_in_one_step_one_short_head_costs_its_exact_loss():
    table = {"part": "table", "amount": "12f", "shares": SHARES}
    parts = {"t": reading("top-attention", budget=table).select}

    def both(call, noise):
        looked = look(call)
        exact = float(exact_losses(looked, looked.kept(SCORERS["mass"], (5,)), [(1, 1)])[0])
        return chunk_losses(call, noise, parts)["t"], exact

    (one, exact), _ = tried((1000.0,), both)
    assert one**2 == pytest.approx(exact, rel=1e-9) and one > 1e-5


def test_what_cannot_be_judged_is_refused():
    rows = reading("random", budget="30t", granularity="token").select

    def wrong(call, noise):
        step = replace(call.step, step=1)
        with pytest.raises(ValueError, match="first denoising pass"):
            chunk_losses(replace(call, step=step), noise, {})
        with pytest.raises(ValueError, match="whole frames"):
            chunk_losses(call, noise, {"rows": rows})
        return True

    assert tried((1000.0, 600.0), wrong)[0]
