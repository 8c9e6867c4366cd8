"""Rules that label heads by what they attended to, or lost, in rollouts with the full cache.

Shapes: C chunks, L layers, H heads, F frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Labels = list[list[str]]
"""A row per layer, one word per head."""

LAGS = 36
"""With fewer lags, labels of waves still change with their number (embedded model)."""

FINE = 16
"""Wave lengths that are compared for each that fits into a curve a whole number of times."""


@dataclass(frozen=True)
class Profile:
    """What heads attended to, mean over clips.

    Args:
        mass: Softmax mass by frame of every chunk, ``[C, L, H, F]`` (the table ``mass``).
        starts: First frame of each chunk, and the number of frames behind the last.
        logits: Mean logit by lag, ``[L, H, F]`` (the table ``lags``).
    """

    mass: Tensor
    starts: tuple[int, ...]
    logits: Tensor


def nearness(profile: Profile, sink: int = 3) -> Tensor:
    """Share of the mass beyond the sink that lies on the last frame of history and the chunk.

    Mean over chunks with more history than that, ``[L, H]``.

    Raises:
        ValueError: There is no such chunk, or a head looks at nothing but the sink.
    """
    found = []
    for chunk, (start, end) in enumerate(zip(profile.starts, profile.starts[1:], strict=False)):
        if start - 1 > sink:
            mass = profile.mass[chunk].double()
            near, rest = (mass[..., low:end].sum(-1) for low in (start - 1, sink))
            if not (rest > 0).all():
                raise ValueError(
                    f"A head looks at nothing but the first {sink} frames in chunk {chunk}: it has "
                    "no share of the rest. Give a smaller sink, or other rollouts."
                )
            found.append(near / rest)
    return torch.stack(_some(found, sink + 2)).mean(0)


def forcing_kv(profile: Profile, sink: int = 3, share: float = 0.8) -> Labels:
    """Static and dynamic heads of Forcing-KV (arXiv 2605.09681).

    Static: at least a ``share`` of the mass beyond the first ``sink`` frames lies on the last frame
    of history and on the chunk itself (in chunks of 3 the last 4 frames).
    """
    return _words(nearness(profile, sink) >= share, "static", "dynamic")


def head_forcing(
    profile: Profile, frames: int = 3, local: float = 0.6, anchor: float = 0.5
) -> Labels:
    """Local, anchor and memory heads, after Head Forcing (arXiv 2605.14487), which has no code.

    Ours: of the mass on history, ``local`` or more on its last ``frames`` makes a local head, else
    ``anchor`` or more on the first ``frames`` an anchor, else it is a memory head. Mean over chunks
    whose history is longer than both.
    """
    found = []
    for chunk, start in enumerate(profile.starts[:-1]):
        if start > 2 * frames:
            mass = profile.mass[chunk, ..., :start].double()
            mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
            found.append(torch.stack([mass[..., -frames:].sum(-1), mass[..., :frames].sum(-1)]))
    last, first = torch.stack(_some(found, 2 * frames + 1)).mean(0)
    rest = _words(first >= anchor, "anchor", "memory")
    return [
        ["local" if near else word for near, word in zip(row, words, strict=True)]
        for row, words in zip((last >= local).tolist(), rest, strict=True)
    ]


def pyramid_forcing(profile: Profile, swings: float = 0.8, period: float = 6.4) -> Labels:
    """Wave, anchor and veil heads, after Pyramid Forcing (arXiv 2605.13111).

    The curve of a head is its mean logit by lag, from 1. Wave: at ``swings`` or more of its inner
    points it turns (from rising to falling or back), or the strongest wave in it is ``period``
    frames long or shorter (the fastest rotary pair turns in 2 pi frames). Ours, since the paper's
    exact rule is not public: the straight line through the curve is taken out before; waves of all
    lengths up to that of the curve are compared, not only those that fit into it a whole number of
    times; of the other heads those whose mean logit is above that of the layer's heads are anchors,
    others veils (a constant changes no softmax, so the sign of a logit tells nothing).

    Raises:
        ValueError: The curve is so short that a slow wave in it passes for a straight line.
    """
    curve = profile.logits[..., 1:].double()
    lags = curve.shape[-1]
    if lags < LAGS:
        raise ValueError(
            f"Waves need a curve of {LAGS} lags or more, and {lags} were recorded. Give longer "
            "rollouts."
        )
    at = torch.arange(lags, dtype=curve.dtype) - (lags - 1) / 2
    flat = curve - curve.mean(-1, keepdim=True)
    flat = flat - (flat @ at / (at @ at)).unsqueeze(-1) * at
    steps = flat.diff(dim=-1)
    turns = (steps[..., 1:] * steps[..., :-1] < 0).double().mean(-1)
    points = FINE * lags
    strongest = torch.fft.rfft(flat, points).abs()[..., FINE:].argmax(-1) + FINE
    wave = (turns >= swings) | (points / strongest <= period)
    mean = curve.mean(-1)
    rest = _words(mean > mean.mean(-1, keepdim=True), "anchor", "veil")
    return [
        ["wave" if own else word for own, word in zip(row, words, strict=True)]
        for row, words in zip(wave.tolist(), rest, strict=True)
    ]


def duo_attention(losses: Tensor, share: float = 0.5) -> Labels:
    """Retrieval and streaming heads of DuoAttention (arXiv 2410.10819), without its trained gates.

    Ours: the paper trains a gate for each head, all together, and takes a quantile of them. Here
    the ``share`` of heads that lose most, each alone, with what a streaming head keeps are
    retrieval heads (half of one: up); ties go to the earlier layer and head.

    Args:
        losses: ``[L, H]``, with only the first and newest frames.
        share: Of retrieval heads among those of the model.
    """
    order = losses.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(losses.numel(), dtype=torch.bool)
    mask[order[: math.floor(share * losses.numel() + 0.5)]] = True
    return _words(mask.view_as(losses), "retrieval", "streaming")


RULES: dict[str, Callable[[Profile], Labels]] = {
    "forcing-kv": forcing_kv,
    "head-forcing": head_forcing,
    "pyramid-forcing": pyramid_forcing,
}
"""By the method whose labels they give, of a profile."""


def _words(mask: Tensor, yes: str, no: str) -> Labels:
    return [[yes if own else no for own in row] for row in mask.tolist()]


def _some(found: list[Tensor], frames: int) -> list[Tensor]:
    if not found:
        raise ValueError(
            f"No chunk has {frames} frames of history, so nothing tells heads apart. Give longer "
            "rollouts."
        )
    return found
