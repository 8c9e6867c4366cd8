"""Settings of `pretrain-encoder`: plain data without torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EncoderRecipe:
    """Everything that the training of the panorama encoder depends on.

    Args:
        seed: Of worlds, degradations and initial weights.
        steps: Optimiser steps.
        worlds: Worlds per step; each gives one clean clip and one that may be degraded.
        lr: Peak learning rate; it warms up, then falls to 0 along a half cosine.
        warmup: Steps of linear warm-up.
        weight_decay: Of all matrices.
    """

    seed: int = 0
    steps: int = 700
    worlds: int = 32
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.02


@dataclass
class PretrainEncoderOptions:
    """Train the encoder that panorama clips are compared with, or go on from the last checkpoint.

    Args:
        recipe: What to train.
        out: Run directory: checkpoints, losses and, at the end, the weights.
        threads: CPU threads; another number sums in another order and gives other last digits.
        checkpoint_every: Steps between two checkpoints.
    """

    recipe: EncoderRecipe = field(default_factory=EncoderRecipe)
    out: Path = Path("runs/pretrain_encoder")
    threads: int = 1
    checkpoint_every: int = 50
