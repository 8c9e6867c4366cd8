"""Labels of a model's heads from rollouts with the full cache."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_kv.models.video import VideoModel
from lightning_kv.policies.profiles import RULES, Profile
from lightning_kv.policies.registry import preset
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


def labels_of(method: str, profile: Profile) -> list[list[str]]:
    """A word for each head by a method's rule.

    Raises:
        ValueError: No rule of that name, or a profile too short for it.
    """
    if method not in RULES:
        raise ValueError(unknown("profile rule", method, RULES))
    return RULES[method](profile)


def _some(prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("A profile of no prompts was asked for. Give one or more.")
