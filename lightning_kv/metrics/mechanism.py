"""What a policy loses inside attention, per clip: the curves that a probe of the cache wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_kv.metrics.base import ClipMetric
from lightning_kv.metrics.inputs import Labels, hint, shown

PROBED = (
    "the last denoising pass of every frame, 16 queries per frame, mean over layers and heads, "
    "against attention over everything that this rollout committed"
)


class AttentionMetric(ClipMetric):
    """One of the curves that a probe wrote, by the name of the metric.

    Args:
        kwargs: As in :class:`~lightning_kv.metrics.base.ClipMetric`.
    """

    needs: ClassVar[tuple[str, ...]] = ("attention",)
    undefined = "no frame was asked about"

    def curve(self, values: Tensor) -> Tensor:
        """Value of every frame of one clip, float64 ``[F]``; adds nothing.

        Args:
            values: ``[F]``, NaN in frames that were not asked about.
        """
        return values.double()

    def update(
        self,
        curves: Tensor | Sequence[Tensor],
        *,
        ids: Labels = None,
        units: Labels = None,
    ) -> None:
        """Add the curves of a batch of clips.

        Args:
            curves: ``[B, F]``, or a list of ``[F]`` of any lengths; NaN in frames that do not
                count.
            ids: As in :meth:`~lightning_kv.metrics.base.VideoMetric.update`.
            units: As there.

        Raises:
            ValueError: These are no curves, or labels do not fit.
        """
        several = isinstance(curves, list | tuple) or (isinstance(curves, Tensor) and curves.ndim)
        clips = list(curves) if several else [curves]
        for place, clip in enumerate(clips):
            if not isinstance(clip, Tensor) or clip.ndim != 1 or not clip.is_floating_point():
                raise ValueError(
                    f"'{self.name}' takes curves of clips, and number {place} is {shown(clip)}. "
                    "Pass floating point numbers [clips, frames], or a list of [frames]."
                    f"{hint(clip)}"
                )
        self._add_all((self.curve(clip) for clip in clips), ids, units, len(clips))


class RetainedMass(AttentionMetric):
    """Share of full attention's softmax mass on the rows that the policy reads.

    See :func:`~lightning_kv.metrics.functional.retained_mass`, which says it of single rows.

    Example:
        >>> import torch
        >>> metric = RetainedMass()
        >>> metric.update(torch.tensor([[1.0, 0.5]]))
        >>> metric.compute().item()
        0.75
    """

    name = "retained_mass"
    unit = "share"
    higher_is_better = True
    recipe = f"exp(LSE of the rows read - LSE of all rows), {PROBED}; not clamped"
    plot_lower_bound = 0.0


class AttentionError(AttentionMetric):
    """Relative error of the attention output of a head.

    See :func:`~lightning_kv.metrics.functional.output_error`, which says it of single rows.

    Example:
        >>> import torch
        >>> metric = AttentionError(curves=True)
        >>> metric.update([torch.tensor([0.0, 0.25]), torch.tensor([0.5])])
        >>> metric.compute().item(), [curve.tolist() for curve in metric.curves]
        (0.3125, [[0.0, 0.25], [0.5]])
    """

    name = "attention_error"
    unit = "share"
    higher_is_better = False
    recipe = f"|o - o_full| / |o_full| of a head's output, {PROBED}"
    plot_lower_bound = 0.0
