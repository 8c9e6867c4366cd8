"""Precision profiles: which casts a network makes, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Profile:
    """The casts of the transformer; text encoder and VAE take the dtype.

    Args:
        about: When to use it, in a sentence.
        dtype: Of weights, activations and cached rows.
        rotary: Smallest dtype in which keys and queries are rotated.
        estimate: Smallest dtype in which the output becomes a clean estimate.
        fused_norm: Use the fused root mean square norm, which multiplies by its weight before it
            casts; the originals cast first.
    """

    about: str
    dtype: torch.dtype
    rotary: torch.dtype
    estimate: torch.dtype
    fused_norm: bool


PROFILES = {
    "float32": Profile(
        "Everything in float32: the embedded model, tests, and comparison without rounding.",
        torch.float32,
        torch.float32,
        torch.float64,
        fused_norm=False,
    ),
    "reference": Profile(
        "The casts of the original code: bfloat16, rotation and clean estimate in float64.",
        torch.bfloat16,
        torch.float64,
        torch.float64,
        fused_norm=False,
    ),
    "fast": Profile(
        "bfloat16 with rotation and clean estimate in float32, and fused norms.",
        torch.bfloat16,
        torch.float32,
        torch.float32,
        fused_norm=True,
    ),
}


def known_profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        ValueError: No profile of that name.
    """
    if name not in PROFILES:
        raise ValueError(f"No precision profile {name!r}. Profiles: {', '.join(PROFILES)}.")
    return PROFILES[name]
