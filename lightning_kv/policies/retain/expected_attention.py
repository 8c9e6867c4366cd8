"""Keep the rows that queries to come are expected to look at, by the distribution of past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.rotary import rotate, rotate_by, wide
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import Moments, update_moments


@dataclass(frozen=True)
class ExpectedAttention(UnitPart):
    """Keep the rows that queries to come are expected to look at, and the newest chunk.

    Expected Attention (arXiv 2510.00636). Queries before rotation are taken for Gaussian, with
    the mean and covariance of those of all clean passes; a query to come is one of them, turned by
    the mean rotation over the next frames. The expected exponential of its logit with a key has a
    closed form; its share among the rows of a head, times the length of the value, is the score. A
    frame scores as much as all its rows.

    Ours: the mean rotation is over times; a query lies at the place of the key that it meets. All
    passes weigh alike, sinks have their share in the softmax, and the first frames are no sink
    unless ``sink`` says so (the paper protects 4 tokens).

    Args:
        horizon: Frames to come over which rotations are averaged (the paper: 512 tokens).
        epsilon: Added to the expected share of attention before it is multiplied by the length of
            the value (the authors use 0, the default of their code, and 0.02).
        covariance: Count the spread of queries; else their mean alone.
    """

    name: ClassVar[str] = "expected-attention"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "expected-attention",
            "Keep the frames that queries distributed as past ones are expected to look at, and "
            "the newest chunk; drop the others.",
            "Expected Attention, arXiv 2510.00636",
            ("memory", "reads"),
            {"retain": {"part": "expected-attention", "budget": "9f"}},
            "single tokens of a text: horizon 512, sink of 4, epsilon 0",
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    horizon: int = 12
    epsilon: float = 0.0
    covariance: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "horizon")
        between(self, 0, None, "epsilon")

    def observe(self, view: PassView, state: Any) -> None:
        """Mean and covariance of the queries of a clean pass."""
        update_moments(view, state, covariance=self.covariance)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """Expected attention times length of the value, of a frame that of all its rows."""
        if view.layer not in state.get("moments", {}):
            raise ValueError(
                f"{named(self, view)} knows no query of a clean pass. Use a sampler that commits "
                "frames in a pass at t = 0."
            )
        view.scored += sum(view.lengths)  # one query meets every key
        logits = self.logits(view.ahead(), state["moments"][view.layer])
        mass = logits.masked_fill(~view.valid, -torch.inf).softmax(-1)
        score = ((mass + self.epsilon) * wide(view.values()).norm(dim=-1)).unsqueeze(1)
        return view.by_frame(score) if self.unit == "frame" else score

    def logits(self, ahead: CacheView, queries: Moments) -> Tensor:
        """Log of the expected exponential of the logit of every row, ``[H, N]``."""
        key = self.turned_back(ahead)
        logits = (key @ queries.mean.transpose(1, 2))[..., 0] / key.shape[-1] ** 0.5
        if self.covariance:
            logits = logits + ((key @ queries.covariance) * key).sum(-1) / (2 * key.shape[-1])
        return logits

    def turned_back(self, ahead: CacheView) -> Tensor:
        """Keys as a query before rotation meets them: turned back as it will be turned on.

        The transpose of the mean rotation of the queries, which lie at the place of the key.
        """
        here = ahead.angles(torch.zeros_like(ahead.time), ahead.place)
        key = rotate(wide(ahead.keys("read")), -here)
        coming = ahead.step.query_times[0] + torch.arange(self.horizon, device=ahead.device)
        turn = ahead.angles(coming, coming.new_zeros(self.horizon, 2))  # spatial pairs: none
        cos, sin = (x.mean(0).to(key) for x in (turn.cos(), turn.sin()))
        return rotate_by(key, cos, -sin)
