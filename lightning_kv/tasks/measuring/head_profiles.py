"""Labels of a model's heads, and means of their queries, from rollouts with the full cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kv.cache.session import CacheSession
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.profiles import RULES, Profile
from lightning_kv.policies.query_tables import query_table
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout
from lightning_kv.utilities.nearest import unknown


def profile(model: VideoModel, prompts: Sequence[str], frames: int, seed: int = 0) -> Profile:
    """What heads attend to, mean over prompts, one clip at a time.

    Args:
        model: Any.
        prompts: Texts, one clip each.
        frames: Latent frames of a clip.
        seed: Of the noise.

    Raises:
        ValueError: No prompts, or frames that make no chunks of this model.
    """
    _some(prompts)
    mass = logits = 0
    for prompt in prompts:
        found = rollout(
            model, preset("full"), prompt, frames, seed=seed, decode=False, record=("mass", "lags")
        )
        mass = mass + found.tables["mass"][0].mass["cond"].cpu().double() / len(prompts)
        logits = logits + found.tables["lags"][0].logits["cond"].cpu().double() / len(prompts)
    plan = model.network.config.plan(frames)
    starts = (*range(0, frames, plan.chunk), frames)
    return Profile(mass, starts, logits)


def query_statistics(
    model: VideoModel, prompts: Sequence[str], frames: int, seed: int = 0
) -> dict[str, Any]:
    """What tri-attention's setting ``statistics`` reads: means of clean queries, of all prompts.

    Args:
        model: Any whose sampler commits frames in passes at t = 0.
        prompts: Texts, one clip each.
        frames: Latent frames of a clip.
        seed: Of the noise.

    Raises:
        ValueError: No prompts.
    """
    _some(prompts)
    part = {"part": "tri-attention", "horizon": frames}  # without a budget it keeps all
    policy, states = policy_from_dict({"name": "seen", "retain": part}), []

    def keep(_: int, session: CacheSession) -> None:
        states[-1].update(session.samples[0].states["cond"]["retain"])

    for prompt in prompts:
        states.append({})
        rollout(model, policy, prompt, frames, seed=seed, decode=False, progress=keep)
    return query_table(states, model.network.geometry().layers)


def labels_of(method: str, profile: Profile) -> list[list[str]]:
    """A word for each head by a method's rule.

    Raises:
        ValueError: No rule of that name, or a profile too short for it.
    """
    if method not in RULES:
        raise ValueError(unknown("profile rule", method, RULES))
    return RULES[method](profile)


def save_labels(
    path: Path, labels: list[list[str]], method: str, model: str, about: str, source: str
) -> None:
    """Write a head table that a setting ``labels`` reads."""
    told = {"method": method, "model": [model], "source": source, "about": about}
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in told.items())
    rows = ",\n  ".join(json.dumps(row) for row in labels)
    path.write_text(f'{{\n{head} "labels": [\n  {rows}\n ]\n}}\n')


def _some(prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("A profile of no prompts was asked for. Give one or more.")
