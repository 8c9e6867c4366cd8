"""How close attention over a cache is to attention over everything, head by head.

With p the softmax of full attention and S the rows that are kept, r = sum of p over S is the
retained mass. Where rows are only left out, the outputs differ by exactly
``o - o_kept = (1 - r) (o_evicted - o_kept)``: mass alone bounds no error, so both are measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kv.metrics.base import SavedMetric

BINS, TOP = 2000, 2.0  # of the histograms: bins of 0.001, and one for all that is beyond


def retained_mass(lse_kept: Tensor, lse_all: Tensor) -> Tensor:
    """Share of the softmax mass of all rows that falls on the kept ones.

    Two log-sum-exps of the same logits say it without an attention matrix. It is not clamped: above
    1 the "kept" rows are not among those of ``lse_all``, or not at the same positions.

    Args:
        lse_kept: Log-sum-exp of the logits of the kept rows, any shape.
        lse_all: The same over all rows.

    Returns:
        float64, the same shape.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> logits = torch.tensor([2.0, 1.0, 0.0])
        >>> round(retained_mass(logits[:2].logsumexp(0), logits.logsumexp(0)).item(), 4)
        0.91
    """
    _check("log-sum-exps", lse_kept, lse_all)
    return (lse_kept.double() - lse_all.double()).exp()


def output_error(out: Tensor, out_ref: Tensor) -> Tensor:
    """Length of the difference of two attention outputs, relative to the reference's.

    Args:
        out: ``[..., D]``.
        out_ref: The same shape.

    Returns:
        float64 ``[...]``; infinite where only the reference is 0, NaN where both are.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> output_error(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 4.0]])).tolist()
        [0.6]
    """
    _check("outputs", out, out_ref)
    reference = out_ref.double()
    return (out.double() - reference).norm(dim=-1) / reference.norm(dim=-1)


def topk_recall(weights: Tensor, kept: Tensor, k: int) -> Tensor:
    """Share of the k rows with the largest weights that are kept.

    Args:
        weights: Attention weights or logits of full attention ``[..., N]``.
        kept: bool, broadcast to the same shape.
        k: Number of rows, 1 to N.

    Returns:
        float64 ``[...]``.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> kept = torch.tensor([True, False, True, True])
        >>> topk_recall(torch.tensor([0.1, 0.4, 0.3, 0.2]), kept, k=2).item()
        0.5
    """
    if not 1 <= k <= weights.shape[-1]:
        raise ValueError(
            f"The {k} largest of {weights.shape[-1]} weights were asked for. "
            f"Give k from 1 to {weights.shape[-1]}."
        )
    top = weights.topk(k, dim=-1).indices
    return kept.expand_as(weights).gather(-1, top).double().mean(-1)


class AttentionFidelity(SavedMetric):
    """Retained mass and output error of every layer, head, denoising step and chunk.

    All states are sums, so ranks and shards with uneven numbers of clips merge by addition. The
    quantiles come from histograms with fixed edges (bins of 0.001 up to 2), over heads and queries
    of all updates, and are exact to a bin; beyond the last edge they are infinite.

    Args:
        layers: Number L of layers.
        heads: Number H of heads in each.
        steps: Number S of denoising steps.
        chunks: Number K of chunks.
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = AttentionFidelity(layers=1, heads=1, steps=1, chunks=2)
        >>> everything, out = torch.zeros(1, 4), torch.ones(1, 4, 8)
        >>> metric.update(everything - 0.5, everything, 0.75 * out, out, layer=0, step=0, chunk=1)
        >>> found = metric.compute()
        >>> [round(x, 4) for x in found["retained_mass"].flatten().tolist()]
        [nan, 0.6065]
        >>> found["attention_error"].flatten().tolist()
        [nan, 0.25]
    """

    higher_is_better = None

    total: Tensor
    count: Tensor
    histogram: Tensor

    def __init__(self, layers: int, heads: int, steps: int, chunks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        cells = (layers, heads, steps, chunks)
        states = {
            "total": torch.zeros(2, *cells, dtype=torch.float64),
            "count": torch.zeros(cells, dtype=torch.int64),
            "histogram": torch.zeros(2, BINS + 1, dtype=torch.int64),
        }
        for name, start in states.items():
            self.add_state(name, start, dist_reduce_fx="sum", persistent=True)

    def update(
        self,
        lse_kept: Tensor,
        lse_full: Tensor,
        out: Tensor,
        out_ref: Tensor,
        layer: int,
        step: int,
        chunk: int,
    ) -> None:
        """Add the queries of one layer in one pass.

        Args:
            lse_kept: Log-sum-exp of the logits that the policy read, ``[H, Q]``.
            lse_full: The same of full attention.
            out: Output under the policy ``[H, Q, D]``.
            out_ref: The same of full attention.
            layer: Index of the layer.
            step: Index of the denoising step.
            chunk: Index of the chunk.

        Raises:
            ValueError: Shapes that do not fit together or to the number of heads, or a value that
                is not a finite number.
        """
        mass, error = retained_mass(lse_kept, lse_full), output_error(out, out_ref)
        heads = self.count.shape[1]
        if mass.shape != error.shape or mass.ndim != 2 or len(mass) != heads:
            raise ValueError(
                f"Log-sum-exps of shape {tuple(lse_full.shape)} and outputs of shape "
                f"{tuple(out_ref.shape)} do not fit a metric of {heads} heads. "
                f"Pass [{heads}, queries] and [{heads}, queries, width]."
            )
        both = torch.stack([mass, error])
        if not bool(both.isfinite().all()):
            raise ValueError(
                f"Layer {layer}, step {step}, chunk {chunk} has {int((~both.isfinite()).sum())} "
                "masses or errors that are not finite. Pass finite numbers, and reference outputs "
                "that are not 0."
            )
        self.total[:, layer, :, step, chunk] += both.sum(-1)
        self.count[layer, :, step, chunk] += both.shape[-1]
        bins = (both * (BINS / TOP)).clamp_max(BINS).long()
        for own, values in zip(self.histogram, bins, strict=True):
            own += torch.bincount(values.flatten(), minlength=BINS + 1)

    def compute(self) -> dict[str, Tensor]:
        """Means and the worst twentieth.

        Returns:
            ``retained_mass`` and ``attention_error``, float64 ``[L, H, S, K]``: means over queries
            and clips, NaN where there were none. ``retained_mass_p05`` and
            ``attention_error_p95``: scalars that 5 % of all queries in all heads fall short of or
            exceed, NaN where there were none.
        """
        mass, error = self.total / self.count
        return {
            "retained_mass": mass,
            "attention_error": error,
            "retained_mass_p05": _quantile(self.histogram[0], 0.05),
            "attention_error_p95": _quantile(self.histogram[1], 0.95),
        }


def _quantile(histogram: Tensor, q: float) -> Tensor:
    """Linear within a bin; infinite in the bin beyond the edges, NaN where nothing was counted."""
    below = histogram.cumsum(0).double()
    if below[-1] == 0:
        return below.new_full((), torch.nan)
    rank = q * below[-1]
    place = int(torch.searchsorted(below, rank))
    if place == BINS:
        return below.new_full((), torch.inf)
    inside = (rank - below[place] + histogram[place]) / histogram[place]
    return (place + inside) * (TOP / BINS)


def _check(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"Two {what} cannot be compared: their shapes are {tuple(one.shape)} and "
            f"{tuple(other.shape)}. Pass two tensors of the same shape, query by query."
        )
