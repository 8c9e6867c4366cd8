"""How close attention over a cache is to attention over everything, head by head.

With p the softmax of full attention and S the rows that are kept, r = sum of p over S is the
retained mass. Where rows are only left out, the outputs differ by exactly
``o - o_kept = (1 - r) (o_evicted - o_kept)``: mass alone bounds no error, so both are measured.
"""

from __future__ import annotations

from torch import Tensor


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
        >>> import torch
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
        >>> import torch
        >>> output_error(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 4.0]])).tolist()
        [0.6]
    """
    _check("outputs", out, out_ref)
    reference = out_ref.double()
    return (out.double() - reference).norm(dim=-1) / reference.norm(dim=-1)


def _check(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"Two {what} cannot be compared: their shapes are {tuple(one.shape)} and "
            f"{tuple(other.shape)}. Pass two tensors of the same shape, query by query."
        )
