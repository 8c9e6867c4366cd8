"""A chunk under a table of budgets, against the plain rollout and against one head at a time."""

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
ALL, NONE = [[12] * 2] * 3, [[0] * 2] * 3


def tried(timesteps, do):
    """What ``do`` finds at the first pass of the last chunk; and the final latents."""
    torch.manual_seed(0)
    network = CausalWan(replace(TINY, timesteps=timesteps)).double().eval()
    model, found = VideoModel(network, None, encoder), []
    plan = ChunkPlan(FRAMES, 3)

    def before(call):
        if call.step.chunk == 4 and call.step.step == 0 and call.step.phase == "denoise":
            noise = keyed_noise(0, ["a"], plan, (1, *network.config.latent_size))
            found.append(do(call, noise))

    out = rollout(model, preset("full"), "a", FRAMES, decode=False, before=before)
    return found[0], out.latents, model


def test_all_frames_cost_nothing_and_none_cost_what_a_rollout_without_history_loses():
    tables = {"all": ALL, "none": NONE, "some": [[3, 12], [0, 1], [7, 2]]}
    losses, latents, model = tried(
        (1000.0, 600.0), lambda call, noise: chunk_losses(call, noise, tables, SCORERS["recency"])
    )
    assert losses["all"] < 1e-24 and 0 < losses["some"] < losses["none"]
    # the same chunk with a policy that reads its newest two frames, the history as it was
    part = {"part": "reach", "reach": 5, "sink": 0}
    policy = policy_from_dict({"name": "near", "select": part})
    steps = []

    def note(call):
        if call.step.chunk == 4 and call.step.step == 0 and call.step.phase == "denoise":
            noise = keyed_noise(0, ["a"], ChunkPlan(FRAMES, 3), (1, *TINY.latent_size))
            two = {"two": [[2] * 2] * 3}
            steps.append(chunk_losses(call, noise, two, SCORERS["recency"])["two"])
            call.session.policy = policy
            for own in call.session.samples:
                own.policy = policy

    out = rollout(model, preset("full"), "a", FRAMES, decode=False, before=note)
    change = (out.latents - latents)[:, 12:].square().sum() / latents[:, 12:].square().sum()
    assert steps[0] == pytest.approx(float(change), rel=1e-8) and steps[0] > 1e-6


def test_in_one_step_a_table_with_one_short_head_is_that_heads_exact_loss():
    table = [[12, 12], [12, 5], [12, 12]]

    def both(call, noise):
        one = chunk_losses(call, noise, {"t": table}, SCORERS["mass"])["t"]
        looked = look(call, SCORERS)
        return one, float(exact_losses(looked, "mass", (5,), [(1, 1)])[0])

    (one, exact), _, _ = tried((1000.0,), both)
    assert one == pytest.approx(exact, rel=1e-9) and one > 1e-9


def test_only_first_passes_of_one_clip_are_judged():
    def later(call, noise):
        step = replace(call.step, step=1)
        with pytest.raises(ValueError, match="first denoising pass"):
            chunk_losses(replace(call, step=step), noise, {}, SCORERS["mass"])
        return True

    assert tried((1000.0, 600.0), later)[0]
