"""What is seen of each held frame when a chunk is committed: the inputs of a learned scorer.

All of it comes from the clean pass over the chunk (and from those before): a sample of its queries
against what is held, and the keys and values of the new frames. Denoising passes cost nothing. No
number changes when all times are shifted, and none knows the index of a frame; of the number of
chunks, only whether the prompt began less than four ago.

Shapes: L layers that are asked about, H heads, F frames of the longest list, D head width, K
features, C context numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import Rotary, rotate
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.scorer.seen import (
    AT,
    PAST,
    Seen,
    gathered,
    held_rows,
    indices,
    places,
    stacked,
)
from lightning_kv.policies.scorer.seen import forget_prompt as forget_prompt
from lightning_kv.policies.scorer.seen import observe_frames as observe_frames
from lightning_kv.policies.statistics import standardised

State = dict[Any, Any]

FLOOR = 1e-4  # of a softmax mass, before its logarithm
CLIP = 4.0  # standard deviations
AGED = 24.0  # frames that `lag` is counted in

FEATURES: dict[str, str] = {
    "content-dot": "1: mean query . mean key before rotation / sqrt(D); z",
    "logit": "1: mean logit of the sampled queries on the frame's rows; z",
    "max-logit": "1: mean over sampled queries of the largest logit in the frame; z",
    "future-near": "1: mean past query turned 1 and 2 chunks on . mean key / sqrt(D); z",
    "future-far": "1: the same 3 and 4 chunks on; z",
    "novelty": "1: 1 - cosine of the mean key to the mean of all candidates'; z",
    "newer-key": "1: largest cosine of the mean key to that of a newer held frame; z",
    "newer-value": "1: the same of mean values; z",
    "neighbour": "1: cosine of the mean key to that of the next newer held frame; z",
    "key-norm": "1: mean length of keys; z",
    "key-spread": "1: population standard deviation of the length of keys; z",
    "value-norm": "1: mean length of values; z",
    "motion": "1: 1 - cosine of the mean key to that of the frame made before; z",
    "age": "1: log(1 + frames from it to the start of the next chunk)",
    "lag": "1: frames from it to the start of the next chunk / 24",
    "last-mass": "1: log(mean softmax mass of the sampled queries + 1e-4)",
    **{
        f"mass-{back}": f"1: log(mass {back} chunks ago + 1e-4); as born before that"
        for back in range(1, PAST + 1)
    },
    "running-mass": "1: log(running mean of mass, decay 0.8 by chunk, + 1e-4)",
    "total-mass": "1: log(sum of mass since birth + 1e-4)",
    "peak-mass": "1: log(largest mass since birth + 1e-4)",
    "since-peak": "1: log(1 + chunks since the largest mass)",
    "birth-mass": "1: log(mass from the queries of its own chunk + 1e-4)",
    "trend": "1: last-mass - running-mass",
    "rank": "1: share of the candidates with a smaller running mass",
    "others-mass": "1: log(mean mass in all heads of all layers that hold the frame + 1e-4)",
    "others-running": "1: log(mean running mass in these heads + 1e-4)",
    "behind": "1: (frames from it to the mean place looked at by all heads) / 6, older is positive",
}
"""What a feature is: version and definition. `z`: standard score among the candidates."""

CONTEXT: dict[str, str] = {
    "budget": "1: log(history frames that the head may keep)",
    "candidates": "1: log(1 + frames among which it chooses)",
    "entropy": "1: entropy of the last mass over candidates / log(candidates)",
    "far": "1: log(mass on all candidates + 1e-4)",
    "looked-at": "1: frames from the mean place looked at by all heads to the next chunk / 24",
    "switch": "1: min(chunks since the prompt switched, 4) / 4",
}
"""Numbers of the whole list, alike for all of its frames."""

GROUPS: dict[str, tuple[str, ...]] = {
    "content": tuple(FEATURES)[:9],
    "norms": ("key-norm", "key-spread", "value-norm", "motion"),
    "age": ("age", "lag"),
    "mass": tuple(FEATURES)[15:26],
    "others": ("others-mass", "others-running", "behind"),
}
"""Features by what they need; settings leave some of them out by these names."""

SCORED = frozenset((*GROUPS["content"], *GROUPS["norms"]))
"""Those that are standard scores among the candidates."""


def feature_hash(names: Sequence[str]) -> str:
    """SHA-256 of the definitions of some features and of all context, to 16 digits.

    Raises:
        KeyError: One is not known.
    """
    told = [f"{name} {FEATURES[name]}" for name in names]
    told += [f"{name} {what}" for name, what in CONTEXT.items()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Listed:
    """Features of the frames of one layer, and what its lists have in common.

    Args:
        features: float32 ``[H, F, K]``, those that were asked for.
        context: float32 ``[H, C]``.
        candidate: bool ``[H, F]``: frames that may be kept or dropped.
    """

    features: Tensor
    context: Tensor
    candidate: Tensor


@dataclass(frozen=True)
class _Known:
    """What is known of the frames of the layers that are asked about; every list is padded.

    Args:
        seen: With the frames of these layers alone.
        candidate: bool ``[L, H, F]``.
        lag: Frames to the start of the next chunk, ``[L, 1, F]``.
        others: Last and running mass in all heads, ``[2, L, 1, F]``.
        looked: Frames from the mean place looked at to the next chunk, ``[L, 1, 1]``.
        chunk: Frames of a chunk.
        rotary: The model's.
    """

    seen: Seen
    candidate: Tensor
    lag: Tensor
    others: Tensor
    looked: Tensor
    chunk: int
    rotary: Rotary

    def stat(self, name: str) -> Tensor:
        """One of the numbers that are remembered, ``[L, H, F]``."""
        return self.seen.stats[..., AT[name]]

    def log(self, name: str) -> Tensor:
        """Its logarithm."""
        return (self.stat(name) + FLOOR).log()


def frame_features(
    views: Sequence[CacheView],
    state: State,
    names: Sequence[str],
    guards: Sequence[Tensor],
    budgets: Sequence[Tensor],
) -> list[Listed]:
    """Features of the frames that some layers hold, by the last clean pass.

    Args:
        views: Of the layers.
        state: In which :func:`~.seen.observe_frames` has seen the passes.
        names: Which features, in this order.
        guards: Of each layer, bool ``[1 or H, F]``: frames that are kept in any case.
        budgets: Of each layer, history frames of each head, ``[1 or H]``.
    """
    known = _known(views, state["seen"].spread(), guards)
    shape = known.candidate.shape
    scored = [name for name in names if name in SCORED]
    found = {name: own.expand(shape) for name, own in _found(known, names).items()}
    if scored:
        scores = standardised(torch.stack([found[name] for name in scored]), known.candidate)
        found |= dict(zip(scored, scores.clamp(-CLIP, CLIP), strict=True))
    features = torch.stack([found[name] for name in names], -1).float()
    context = _context(known, torch.stack([own.expand(shape[1]) for own in budgets]))
    sizes = [len(view.frames) for view in views]
    each = zip(features, context, known.candidate, sizes, strict=True)
    return [Listed(x[:, :size], c, own[:, :size]) for x, c, own, size in each]


def _known(views: Sequence[CacheView], seen: Seen, guards: Sequence[Tensor]) -> _Known:
    """What is known of the frames of some layers."""
    heads, like = views[0].heads, seen.stats
    frames = tuple(view.frames for view in views)
    there = stacked([view.present.expand(heads, -1) for view in views])
    guard = stacked([own.expand(heads, -1) for own in guards])
    seen = _aligned(seen, views, there)
    most = there.shape[-1]
    each = [lags(view) + [0] * (most - len(view.frames)) for view in views]
    lag = upload([x for row in each for x in row], like, torch.float32).view(-1, 1, most)
    place = {frame: number for number, frame in enumerate(seen.everywhere)}
    at = [[place.get(frame, len(place)) for frame in own] for own in frames]
    others = seen.shared[:, indices(at, like)].unsqueeze(2)
    candidate = there & ~guard
    any_head = candidate.any(1, keepdim=True)
    weight = others[1] * any_head
    total = weight.sum(-1, keepdim=True).clamp_min(FLOOR)
    looked = (weight * lag).sum(-1, keepdim=True) / total
    geometry = views[0].geometry
    chunk = geometry.chunk or len(views[0].step.final) or views[0].query_frames
    return _Known(seen, candidate, lag, others, looked, chunk, geometry.rotary)


def lags(view: CacheView) -> list[int]:
    """Frames from each held frame to the start of the chunk that comes next."""
    step = view.step
    start = step.final[-1] + 1 if step.final and view.query is None else step.start
    return [start - frame for frame in view.frames]


def _aligned(seen: Seen, views: Sequence[CacheView], there: Tensor) -> Seen:
    """The same of some layers, and of the frames that they hold by now."""
    layers, frames = [view.layer for view in views], tuple(view.frames for view in views)
    names = ("stats", "keys", "values", "query", "past")
    own = {name: getattr(seen, name) for name in names}
    if layers != [*range(len(seen.frames))]:
        index = upload(layers, there, torch.int64)
        own = {name: x.index_select(0, index) for name, x in own.items()}
    known = [seen.frames[layer] for layer in layers]
    if known != list(frames):
        own |= _placed(own, views, known)
    else:  # other layers may have more
        own |= {name: own[name][:, :, : there.shape[-1]] for name in names[:3]}
    return Seen(
        frames, **own, there=there, queries=seen.queries, chunks=seen.chunks,
        everywhere=seen.everywhere, shared=seen.shared,
    )  # fmt: skip


def _placed(
    own: dict[str, Tensor], views: Sequence[CacheView], known: Sequence[tuple[int, ...]]
) -> dict[str, Tensor]:
    """What is known of frames at the places where views have them; masses of lost ones are 0."""
    pairs = zip(views, map(set, known), strict=True)
    lost = [tuple(f for f in view.frames if f not in frames) for view, frames in pairs]
    index = indices(places(known, lost, [view.frames for view in views]), own["stats"])
    found = {name: own[name] for name in ("stats", "keys", "values")}
    if any(lost):
        rows = [held_rows(view, frames) for view, frames in zip(views, lost, strict=True)]
        norms = stacked([each.norms for each in rows])
        blank = own["stats"].new_zeros(*norms.shape[:3], own["stats"].shape[-1])
        blank[..., AT["key"] : AT["motion"]] = norms
        more = {"stats": blank}
        more |= {name: stacked([getattr(x, name) for x in rows]) for name in ("keys", "values")}
        found = {name: torch.cat([x, more[name]], 2) for name, x in found.items()}
    return {name: gathered(x, index) for name, x in found.items()}


def _found(known: _Known, names: Sequence[str]) -> dict[str, Tensor]:
    """Features that were asked for, before they are made standard scores, ``[L, 1 or H, F]``."""
    found: dict[str, Tensor] = {}
    for make, own in MAKERS:
        if wanted := set(own) & set(names):
            made = make(known)
            found |= {name: made[name] for name in wanted}
    return found


def _masses(known: _Known) -> dict[str, Tensor]:
    """Features from masses."""
    running, last = known.stat("running"), known.log("last")
    lower = running.unsqueeze(3) > running.unsqueeze(2)  # [L, H, F, F]
    count = known.candidate.sum(-1, keepdim=True).clamp_min(2)
    ago = {f"mass-{back}": known.log(f"ago{back}") for back in range(1, PAST + 1)}
    told = {f"{name}-mass": known.log(name) for name in ("running", "total", "peak", "birth")}
    return {
        "last-mass": last,
        **ago,
        **told,
        "since-peak": known.stat("since").log1p(),
        "trend": last - told["running-mass"],
        "rank": (lower & known.candidate.unsqueeze(2)).sum(-1) / (count - 1),
    }


def _rows(known: _Known) -> dict[str, Tensor]:
    """Features from what rows are like, and from single logits."""
    named = {"key-norm": "key", "key-spread": "spread", "value-norm": "value", "motion": "motion"}
    named |= {"logit": "logit", "max-logit": "top"}
    return {name: known.stat(stat) for name, stat in named.items()}


def _ages(known: _Known) -> dict[str, Tensor]:
    """Features from the age alone."""
    return {"age": known.lag.log1p(), "lag": known.lag / AGED}


def _others(known: _Known) -> dict[str, Tensor]:
    """Features from where all heads look."""
    last, running = (known.others + FLOOR).log()
    behind = (known.lag - known.looked) / 6
    return {"others-mass": last, "others-running": running, "behind": behind}


def _asked(known: _Known) -> dict[str, Tensor]:
    """Features from mean queries and mean keys."""
    seen, width = known.seen, known.seen.keys.shape[-1] ** 0.5
    near, far = _future(known).unbind(-1)
    content = (seen.keys @ seen.query.unsqueeze(-1)).squeeze(-1)
    return {
        "content-dot": content / width,
        "future-near": near / width,
        "future-far": far / width,
    }


def _future(known: _Known) -> Tensor:
    """Logits times sqrt(D) that the mean query would have 1 and 2, and 3 and 4 chunks on.

    As :func:`~lightning_kv.policies.future_score.future_scores` with a gate of 0, both at once.
    Zeros where the prompt has just switched.

    Returns:
        ``[L, H, F, 2]``.
    """
    seen, rotary = known.seen, known.rotary
    if not seen.queries:
        return seen.keys.new_zeros(*seen.keys.shape[:3], 2)
    still = torch.zeros((), dtype=torch.float64, device=seen.keys.device)
    at = upload([float(known.chunk * ahead) for ahead in (1, 2, 3, 4)], still, torch.float64)
    asked = rotate(seen.past.unsqueeze(2), rotary.angles(at, still, still), rotary.work)
    asked = asked.unflatten(2, (2, 2)).mean(3)  # [L, H, 2, D]
    back = rotate(seen.keys, rotary.angles(-known.lag, still, still), rotary.work)
    return back @ asked.to(back).transpose(2, 3)


def _content(known: _Known) -> dict[str, Tensor]:
    """Features from how keys and values are alike."""
    seen = known.seen
    keys, values = normalize(seen.keys, dim=-1), normalize(seen.values, dim=-1)
    count = keys.shape[2]
    later = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu(1)
    newer = later & seen.there.unsqueeze(2)  # [L, H, F, F]
    alike, same = keys @ keys.transpose(2, 3), values @ values.transpose(2, 3)
    place = torch.arange(count, device=keys.device)
    after = torch.where(newer, place, count).amin(-1, keepdim=True)
    neighbour = alike.gather(3, after.clamp_max(count - 1)).masked_fill(after == count, 0.0)
    mean = (seen.keys * known.candidate.unsqueeze(-1)).sum(2, keepdim=True)
    return {
        "novelty": 1 - (keys * normalize(mean, dim=-1)).sum(-1),
        "newer-key": _most(alike, newer),
        "newer-value": _most(same, newer),
        "neighbour": neighbour.squeeze(-1),
    }


def _most(alike: Tensor, newer: Tensor) -> Tensor:
    """Largest cosine to a newer frame that the head holds, ``[L, H, F]``; 0 without any."""
    best = alike.masked_fill(~newer, -torch.inf).amax(-1)
    return best.masked_fill(best == -torch.inf, 0.0)


MAKERS: tuple[tuple[Callable[[_Known], dict[str, Tensor]], tuple[str, ...]], ...] = (
    (_masses, GROUPS["mass"]),
    (_rows, ("logit", "max-logit", *GROUPS["norms"])),
    (_ages, GROUPS["age"]),
    (_others, GROUPS["others"]),
    (_asked, ("content-dot", "future-near", "future-far")),
    (_content, ("novelty", "newer-key", "newer-value", "neighbour")),
)
"""What makes which features."""


def _context(known: _Known, budget: Tensor) -> Tensor:
    """Numbers of each list, ``[L, H, C]``, as :data:`CONTEXT` names them.

    Args:
        known: Of the frames.
        budget: ``[L, H]``; less than a frame counts as one.
    """
    candidate = known.candidate
    mass, count = known.stat("last") * candidate, candidate.sum(-1).to(known.seen.stats)
    total = mass.sum(-1)
    share = mass / total.clamp_min(FLOOR).unsqueeze(-1)
    entropy = -(share * share.clamp_min(FLOOR).log()).sum(-1) / count.clamp_min(2).log()
    looked = (known.looked / AGED).squeeze(-1).expand_as(total)
    switch = torch.full_like(total, min(known.seen.chunks, 4) / 4)
    every = [budget.clamp_min(1).to(total).log(), count.log1p(), entropy, (total + FLOOR).log()]
    return torch.stack([*every, looked, switch], -1).float()
