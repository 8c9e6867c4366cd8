"""What a policy loses inside attention, per clip: the curves that a probe of the cache wrote."""

from __future__ import annotations

from torch import Tensor

from lightning_kv.metrics.base import Clip, ClipMetric

PROBED = (
    "the last denoising pass of every frame, 16 queries per frame, mean over layers and heads, "
    "against attention over everything that this rollout committed"
)


class AttentionMetric(ClipMetric):
    """One of the curves in ``Clip.attention``; a subclass says which by its name."""

    needs = ("attention",)
    undefined = "no frame was asked about"

    def frame_values(self, clip: Clip) -> Tensor:
        """The curve of this name."""
        return clip.attention[self.name].double()


class RetainedMass(AttentionMetric):
    """Share of full attention's softmax mass on the rows that the policy reads.

    Example:
        >>> import torch
        >>> curves = {"retained_mass": torch.tensor([1.0, 0.5])}
        >>> metric = RetainedMass()
        >>> metric.update(Clip(torch.zeros(2, 16, 4, 4), attention=curves))
        >>> metric.compute().item()
        0.75
    """

    name = "retained_mass"
    unit = "share"
    higher_is_better = True
    recipe = f"exp(LSE of the rows read - LSE of all rows), {PROBED}; not clamped"


class AttentionError(AttentionMetric):
    """Relative error of the attention output of a head.

    Example:
        >>> import torch
        >>> curves = {"attention_error": torch.tensor([0.0, 0.25])}
        >>> AttentionError().curve(Clip(torch.zeros(2, 16, 4, 4), attention=curves)).tolist()
        [0.0, 0.25]
    """

    name = "attention_error"
    unit = "share"
    higher_is_better = False
    recipe = f"|o - o_full| / |o_full| of a head's output, {PROBED}"
