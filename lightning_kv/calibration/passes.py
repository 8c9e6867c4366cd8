"""Losses of a pass when one head reads fewer frames: by probes, and exactly.

A head's loss at a budget is the squared change of the clean estimate, relative to that estimate,
when this head alone reads fewer frames of history.

Shapes: L layers, H heads, T query tokens, F held frames, U = F + 1, D head width, K probes, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.view import PassView
from lightning_kv.calibration.frames import (
    attention_over,
    by_frame,
    check_frames,
    kept_by_score,
    kept_means,
    kept_shares,
)
from lightning_kv.calibration.scorers import Scorer
from lightning_kv.rollout import Call


class _Seen:
    """Stands in for the session: keeps what each layer is shown, and opens a gate behind it."""

    def __init__(self, session: Any, gated: bool) -> None:
        self.session, self.gated = session, gated
        self.views: dict[int, PassView] = {}
        self.out: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """As the session does; a second time, in a backward pass, nothing new is kept."""
        out = self.session.attend(layer, q, k, v, step)
        if layer not in self.views:
            shown = self.session.view(layer, q.detach(), k.detach(), v.detach(), step)
            check_frames(shown)
            self.views[layer], self.out[layer] = shown, out.detach()
            if self.gated:
                self.gates[layer] = torch.zeros_like(out, requires_grad=True)
        return out + self.gates[layer] if self.gated else out


class _Given:
    """Stands in for the session: one layer's attention is given."""

    def __init__(self, session: Any, layer: int, out: Tensor) -> None:
        self.session, self.layer, self.out = session, layer, out

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """What was given, or as the session does."""
        if layer == self.layer:
            return self.out
        return self.session.attend(layer, q, k, v, step)


@dataclass
class Looked:
    """One pass, layer by layer.

    Args:
        call: The pass.
        x0: Its clean estimate ``[1, Q, C, h, w]``.
        tokens: What each block was given.
        embedding: Of the noise levels.
        views: What each layer was shown.
        out: Attention of each layer ``[1, T, H, D]``.
        masses: Mean softmax mass on each held frame, ``[H, F]`` of each layer.
        gradients: Of each probe's product with ``x0``, by the attention of each layer,
            ``[K, T, H, D]``; empty without probes.
    """

    call: Call
    x0: Tensor
    tokens: list[Tensor]
    embedding: Tensor
    views: list[PassView]
    out: list[Tensor]
    masses: list[Tensor]
    gradients: list[Tensor]

    @property
    def norm(self) -> Tensor:
        """Squared norm of the estimate, float64."""
        return self.x0.double().square().sum()

    def kept(self, scorer: Scorer, budgets: Sequence[int], sink: int = 0) -> list[Tensor]:
        """Frames that heads keep by a score, bool ``[N, H, F]`` of each layer.

        Args:
            scorer: See :mod:`lightning_kv.calibration.scorers`.
            budgets: History frames, N numbers.
            sink: First frames that are kept before all others.
        """
        return [
            kept_by_score(scorer(view, mass), view.frames, budgets, sink)
            for view, mass in zip(self.views, self.masses, strict=True)
        ]


def look(call: Call, probes: Sequence[Tensor] = (), remember: bool = False) -> Looked:
    """Run a pass that is thrown away, and keep what is needed to judge heads.

    Args:
        call: From ``rollout(..., before=...)``; one sample.
        probes: Random tensors of the shape of the estimate; their gradients are taken.
        remember: Activations stay for the backward passes, which then run faster; else each block
            runs again.

    Raises:
        ValueError: More than one sample, or a reference policy that does not hold whole frames.
    """
    if len(call.x) != 1:
        raise ValueError(
            f"Calibration looks at one clip at a time, and this pass has {len(call.x)}. Give "
            "rollout one prompt."
        )
    network = call.network
    step = replace(call.step, mode="scratch", opens=False, final=())
    seen = _Seen(call.session, bool(probes))
    inside = []
    with torch.set_grad_enabled(bool(probes)):
        tokens, embedding = network.embed(call.x, call.timesteps)
        for layer in range(len(network.blocks)):
            inside.append(tokens.detach())
            args = (tokens, embedding, call.text, seen, step, range(layer, layer + 1))
            if probes and not remember:
                tokens = checkpoint(network.through, *args, use_reentrant=False)
            else:
                tokens = network.through(*args)
        out = network.unpatch(tokens, embedding, call.x.shape)
        x0 = network.x0(out, call.x, call.timesteps)
        gates = [seen.gates[layer] for layer in sorted(seen.gates)]
        found = []
        for probe in probes:
            product = (x0 * probe.to(x0)).sum()
            found.append(torch.autograd.grad(product, gates, retain_graph=True))
    gradients = [torch.cat(own) for own in zip(*found, strict=True)]
    views = [seen.views[layer] for layer in range(len(network.blocks))]
    masses, out = [frame_mass(view) for view in views], [seen.out[n] for n in range(len(views))]
    embedding = embedding.detach()
    return Looked(call, x0.detach(), inside, embedding, views, out, masses, gradients)


def frame_mass(view: PassView) -> Tensor:
    """Mean softmax mass on each held frame, ``[H, F]``."""
    held, _ = view.attention()
    if not view.frames:
        return held.new_zeros(view.heads, 0)
    return view.by_frame(held)[:, 0] / view.query.shape[1]


def probe_products(looked: Looked, kept: Sequence[Tensor]) -> Tensor:
    """What the restriction of one head changes of each probe's product with the estimate.

    To first order in the change of a head's output, ``t = <gradient, a(K) - a(V)>``; for a random
    probe with independent signs its mean square is the squared change of the estimate
    (Gauss-Newton).

    Args:
        looked: A pass.
        kept: Frames that heads keep, ``[N, H, F]`` of each layer.

    Returns:
        float64 ``[K, L, H, N]``.
    """
    found = []
    for view, gradient, own in zip(looked.views, looked.gradients, kept, strict=True):
        pull = gradient.permute(0, 2, 1, 3)  # [K, H, T, D]
        lse, along = [], []
        for each, out in by_frame(view):
            lse.append(each)
            along.append((pull.to(out) * out).sum(-1))
        means = kept_means(torch.stack(lse, -1), torch.stack(along, -1), _and_all(own))
        found.append((means[..., :-1] - means[..., -1:]).sum(-2))
    return torch.stack(found, 1)


def _and_all(kept: Tensor) -> Tensor:
    """With one more budget, everything."""
    return torch.cat([kept, torch.ones_like(kept[:1])])


def masses_and_errors(
    looked: Looked, kept: Sequence[Tensor], rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Lost softmax mass, and error of the layer's update, of each head alone.

    The error is the squared change of what reaches the residual stream (behind the output
    projection and the gate), relative to the layer's whole update; means over the rows.

    Args:
        looked: A pass.
        kept: Frames that heads keep, ``[N, H, F]`` of each layer.
        rows: int64, queries that stand for all.

    Returns:
        Two float64 ``[L, H, N]``.
    """
    lost, errors = [], []
    frame = rows // looked.views[0].geometry.tokens
    for layer, (view, own) in enumerate(zip(looked.views, kept, strict=True)):
        units = list(by_frame(view, rows))
        lse = torch.stack([each for each, _ in units], -1)
        out = torch.stack([each for _, each in units], -1).movedim(2, 0)  # [D, H, R, U]
        lost.append(1 - kept_shares(lse, own).mean(1))
        means = kept_means(lse, out, _and_all(own)).movedim(0, -1)  # [H, R, N + 1, D]
        change = means[:, :, :-1] - means[:, :, -1:]
        weight, gates = _projection(looked, layer)  # [H, D, o], [Q, o]
        square, update = 0.0, 0.0
        for index, gate in enumerate(gates):
            onto = (weight * gate).to(change)
            here = frame == index
            inner = onto @ onto.transpose(1, 2)
            moved = torch.einsum("hrnd,hde->hrne", change[:, here], inner)
            square = square + (moved * change[:, here]).sum((1, 3))
            update = update + (means[:, here, -1] @ onto).sum(0).square().sum()
        errors.append(square / update)
    return torch.stack(lost), torch.stack(errors)


def _projection(looked: Looked, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's output projection by head ``[H, D, dim]``, and its gate by frame ``[Q, dim]``."""
    network = looked.call.network
    block, heads = network.blocks[layer], looked.views[0].heads
    weight = block.self_attn.o.weight.T.unflatten(0, (heads, -1))
    return weight, block.attention_gate(network.modulation(looked.embedding))[0]


def exact_losses(
    looked: Looked,
    kept: Sequence[Tensor] | None,
    heads: Sequence[tuple[int, ...]] | None = None,
    batch: int = 12,
) -> tuple[Tensor, float]:
    """Relative loss of each head at some budgets, with the layers above it run anew.

    What lies below a head's layer does not change, so a run starts there. Heads go through the
    layers above as a batch, which shares the history.

    Args:
        looked: A pass.
        kept: Frames that heads keep, ``[N, H, F]`` of each layer; None takes a head's whole output
            away (Focused Forcing's measure), and N is 1.
        heads: Layer and head, or layer alone for all of its heads together; every head where None.
        batch: Rows that go through together, one of which changes nothing. The last batch is
            filled up with such rows, since kernels may depend on the number.

    Returns:
        float64 ``[len(heads), N]``, and the largest loss of a row that changed nothing.
    """
    views, floor = looked.views, 0.0
    every = [(layer, head) for layer in range(len(views)) for head in range(views[0].heads)]
    heads = every if heads is None else heads
    found = torch.zeros(len(heads), 1 if kept is None else len(kept[0]), dtype=torch.float64)
    for layer in sorted({own[0] for own in heads}):
        told = _restricted(looked, layer, kept)
        todo = [(i, j) for i, own in enumerate(heads) if own[0] == layer for j in range(len(told))]
        for start in range(0, len(todo), batch - 1):
            some = todo[start : start + batch - 1]
            out = looked.out[layer].expand(batch, -1, -1, -1).clone()
            for row, (i, j) in enumerate(some):
                own = list(heads[i][1:]) or slice(None)
                out[row, :, own] = told[j][:, own].to(out)
            losses = _losses(looked, layer, out)
            floor = max(floor, float(losses[len(some) :].max()))
            for loss, (i, j) in zip(losses.tolist(), some, strict=False):
                found[i, j] = loss
    return found, floor


def _restricted(looked: Looked, layer: int, kept: Sequence[Tensor] | None) -> list[Tensor]:
    """Attention of all heads of a layer at each budget, ``[T, H, D]``."""
    if kept is None:
        return [torch.zeros_like(looked.out[layer][0])]
    return [attention_over(looked.views[layer], own) for own in kept[layer]]


def _losses(looked: Looked, layer: int, out: Tensor) -> Tensor:
    """Relative loss of every row of given attention ``[M, T, H, D]`` of a layer, float64."""
    call, count = looked.call, len(out)
    row = (call.step.samples or (0,))[0]
    step: Pass = replace(call.step, mode="scratch", opens=False, final=(), samples=(row,) * count)
    given: Any = _Given(call.session, layer, out)
    text = [tuple(x.expand(count, *x.shape[1:]) for x in own) for own in call.text]
    tokens = looked.tokens[layer].expand(count, -1, -1, -1)
    embedding = looked.embedding.expand(count, -1, -1)
    layers = range(layer, len(looked.views))
    tokens = call.network.through(tokens, embedding, text, given, step, layers)
    found = call.network.unpatch(tokens, embedding, (count, *call.x.shape[1:]))
    x0 = call.network.x0(found, call.x, call.timesteps.expand(count, -1))
    return (x0.double() - looked.x0.double()).square().flatten(1).sum(1) / looked.norm
