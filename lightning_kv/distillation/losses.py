"""What a scorer is taught by: losses of its scores against what frames turned out to be worth.

A budget k is the number of candidates that a list keeps. Losses are given list by list; a list with
nothing to learn from has the loss 0.

Shapes: N lists, U places of a list, V = U + 1, R queries, S sets of a list.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_kv.distillation.lists import Lists

HALVINGS = 50  # of the bracket of a threshold: in float64 nothing is left of it
SHARE = 1e-15  # the smallest that outputs are divided by: float32 cannot hold its square's products


# -- sets ------------------------------------------------------------------------------------


def ranks(scores: Tensor, candidate: Tensor) -> Tensor:
    """The place of each candidate in the order of scores, 0 for the highest, int64 ``[N, U]``.

    Ties go to the earlier place; what is no candidate comes after all that are.

    Args:
        scores: ``[N, U]`` floats; whatever stands at other places than candidates is not looked at.
        candidate: bool ``[N, U]``.
    """
    lowest = torch.finfo(scores.dtype).min  # minus infinity is a score, too
    key = scores.clamp_min(lowest).masked_fill(~candidate, -torch.inf)
    return key.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def hard_top(scores: Tensor, candidate: Tensor, k: Tensor) -> Tensor:
    """The k candidates with the highest scores, ties to the earlier place, bool ``[N, U]``.

    Args:
        scores: ``[N, U]`` floats.
        candidate: bool ``[N, U]``; all are taken where there are fewer than k.
        k: int64 ``[N]``.
    """
    return (ranks(scores, candidate) < k.unsqueeze(-1)) & candidate


def output_error(lists: Lists, kept: Tensor) -> Tensor:
    """Squared error of a head's output where some candidates alone are kept, float64 ``[..., N]``.

    Of a set m, with the place of all that is read in any case, ``m' G m / (m' p)^2``: exactly what
    attention over this set would give (composition of softmax by frame), mean over the queries.

    Args:
        lists: With outputs.
        kept: bool ``[..., N, U]``, a set of each list or several of them; whatever stands at other
            places than candidates is not looked at.

    Raises:
        ValueError: The lists have no outputs.
    """
    return _mean_error(lists, kept.double())


def _mean_error(lists: Lists, kept: Tensor) -> Tensor:
    """:func:`output_error` in the precision of ``kept``."""
    if lists.share is None:
        raise ValueError(
            "These lists hold targets, and no outputs of later queries. Record outputs with them, "
            "or leave out what is measured on outputs."
        )
    count = kept.shape[:-2].numel()
    sets = kept.masked_fill(~lists.candidate, 0.0).reshape(count, *lists.candidate.shape)
    mask = F.pad(sets, (0, 1), value=1.0).permute(1, 2, 0).unsqueeze(1)  # [N, 1, V, S]
    share, gram, query = (own.to(kept.dtype) for own in (lists.share, lists.gram, lists.query))
    square = ((gram @ mask) * mask).sum(2).clamp_min(0)  # [N, R, S]
    total = (share @ mask.squeeze(1)).clamp_min(SHARE)
    weight = query.sum(-1, keepdim=True)
    query = query / torch.where(weight > 0, weight, 1.0)
    error = (square / total.square() * query.unsqueeze(-1)).sum(1)  # [N, S]
    return error.T.reshape(kept.shape[:-1])


# -- losses ----------------------------------------------------------------------------------


def listwise(scores: Tensor, lists: Lists, tau: float = 1.0) -> Tensor:
    """Cross entropy of the softmax of scores against the shares of targets, ``[N]``.

    ListNet's top-one loss (Cao et al., Learning to rank, ICML 2007): KL divergence, but for a
    constant.

    Args:
        scores: ``[N, U]``.
        lists: With their targets t.
        tau: Shares are those of ``t^(1 / tau)``: above 1, a few frames with almost all of the mass
            do not hide the others, among which the cut is.
    """
    target = lists.target.masked_fill(~lists.candidate, 0.0).pow(1 / tau)
    total = target.sum(-1, keepdim=True)
    share = target / torch.where(total > 0, total, 1.0)
    floor = torch.finfo(scores.dtype).min  # minus infinity would make NaN where nothing is left
    log = scores.masked_fill(~lists.candidate, floor).log_softmax(-1)
    return -(share * log.masked_fill(~lists.candidate, 0.0)).sum(-1)


def cut_aware(scores: Tensor, lists: Lists, k: Tensor) -> Tensor:
    """Ranking loss of the pairs across the cut, weighted by what confusing them costs, ``[N]``.

    ``sum (t_i - t_j) softplus(s_j - s_i) / sum (t_i - t_j)`` over the candidates i that should be
    kept and the others j.

    Args:
        scores: ``[N, U]``.
        lists: With their targets t.
        k: int64 ``[N]``: how many are to be kept.
    """
    scores = scores.masked_fill(~lists.candidate, 0.0)
    top = hard_top(lists.target, lists.candidate, k)
    across = top.unsqueeze(2) & (lists.candidate & ~top).unsqueeze(1)  # [N, U, U]
    cost = lists.target.unsqueeze(2) - lists.target.unsqueeze(1)
    cost = cost.masked_fill(~across, 0.0)
    total = cost.sum((1, 2))
    loss = (cost * F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))).sum((1, 2))
    return loss / torch.where(total > 0, total, 1.0)


def output_loss(scores: Tensor, lists: Lists, k: Tensor, tau: float) -> Tensor:
    """Error of a head's output with the k best kept, over that with none of them, ``[N]``.

    The value is that of the hard set. Its gradient goes straight through to the soft set of
    :func:`soft_top`.

    Args:
        scores: ``[N, U]``.
        lists: With outputs. Where dropping all candidates changes nothing, the loss is 0.
        k: int64 ``[N]``: how many are kept.
        tau: Softness of the cut, in units of the scores; smaller towards the end.

    Raises:
        ValueError: The lists have no outputs, or tau is not above 0.
    """
    hard = hard_top(scores, lists.candidate, k).to(scores.dtype)
    soft = soft_top(scores, lists.candidate, k, tau)
    none = _mean_error(lists, torch.zeros_like(hard))
    error = _mean_error(lists, hard + (soft - soft.detach()))
    matters = (none > 0) & lists.candidate.any(-1)  # without candidates, what is left is rounding
    return torch.where(matters, error / torch.where(matters, none, 1.0), 0.0)


def residual_penalty(residual: Tensor, candidate: Tensor) -> Tensor:
    """Mean square of what a student adds to its prior, over the candidates of a list, ``[N]``.

    Args:
        residual: ``[N, U]``, from :meth:`~lightning_kv.policies.scorer.students.Student.parts`.
        candidate: bool ``[N, U]``.
    """
    square = residual.masked_fill(~candidate, 0.0).square().sum(-1)
    return square / candidate.sum(-1).clamp_min(1)


# -- a soft cut ------------------------------------------------------------------------------


def soft_top(scores: Tensor, candidate: Tensor, k: Tensor, tau: float) -> Tensor:
    """How far each candidate belongs to the k best: ``sigmoid((s - theta) / tau)``, sum k.

    The threshold theta is where the sum is k, and moves with the scores
    (:class:`Threshold`).

    Args:
        scores: ``[N, U]``.
        candidate: bool ``[N, U]``; off these the answer is 0.
        k: int64 ``[N]``; with none, or all or more, to keep, 0 or 1 for all candidates.
        tau: Softness, in units of the scores.

    Raises:
        ValueError: tau is not above 0.
    """
    if not tau > 0:
        raise ValueError(f"A cut cannot be {tau} soft. Give a tau above 0, such as 0.1.")
    count = candidate.sum(-1)
    between = ((k > 0) & (k < count)).unsqueeze(-1)
    wide = scores.double().masked_fill(~candidate, 0.0)
    theta = Threshold.apply(wide, candidate, k, tau)
    soft = torch.sigmoid((wide - theta.unsqueeze(-1)) / tau)
    every = (k >= count).unsqueeze(-1).to(soft).expand_as(soft)
    return torch.where(between, soft, every).masked_fill(~candidate, 0.0).to(scores.dtype)


class Threshold(Function):
    """Where sigmoids around a threshold sum to k; its gradient by the implicit function theorem.

    With ``c = sigmoid((s - theta) / tau)`` and ``sum c = k``: ``d theta / d s_u`` is the share of
    ``c_u (1 - c_u)`` in their sum.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, candidate: Tensor, k: Tensor, tau: float) -> Tensor:
        """The threshold ``[N]`` by bisection; 0 where there is no cut.

        Args:
            ctx: Of autograd.
            scores: float64 ``[N, U]``, finite.
            candidate: bool ``[N, U]``.
            k: int64 ``[N]``.
            tau: Softness, in units of the scores.
        """
        count = candidate.sum(-1)
        between = (k > 0) & (k < count)
        share = torch.where(between, k / count.clamp_min(1), 0.5).to(scores)
        offset = tau * share.logit()  # where all scores are alike, theta is this far below them
        low = scores.masked_fill(~candidate, torch.inf).amin(-1) - offset
        high = scores.masked_fill(~candidate, -torch.inf).amax(-1) - offset
        low, high = (torch.where(between, own, 0.0) for own in (low, high))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            soft = torch.sigmoid((scores - middle.unsqueeze(-1)) / tau)
            more = soft.masked_fill(~candidate, 0.0).sum(-1) > k
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        theta = (low + high) / 2
        ctx.save_for_backward(scores, candidate, theta, between)
        ctx.tau = tau
        return theta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Of the scores."""
        scores, candidate, theta, between = ctx.saved_tensors
        far = (scores - theta.unsqueeze(-1)) / ctx.tau
        log = F.logsigmoid(far) + F.logsigmoid(-far)  # of c (1 - c), which may underflow
        floor = torch.finfo(log.dtype).min
        share = log.masked_fill(~candidate, floor).softmax(-1)
        used = candidate & between.unsqueeze(-1)
        return (gradient.unsqueeze(-1) * share).masked_fill(~used, 0.0), None, None, None
