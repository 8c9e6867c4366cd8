"""What is seen of each held frame when a chunk is committed: the inputs of a learned scorer.

All of it comes from the clean pass over the chunk (and from those before): a sample of its queries
against what is held, and the keys and values of the new frames. Denoising passes cost nothing. No
number changes when all times are shifted, and none knows the index of a frame or of a chunk.

Shapes: H heads, F held frames, R sampled queries, D head width, K features, C context numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import BLOCK
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.future_score import QueryMeans, future_scores, update_query_means
from lightning_kv.policies.statistics import spread_rows, standardised

State = dict[Any, Any]

FLOOR = 1e-4  # of a softmax mass, before its logarithm
DECAY = 0.8  # of a running mass, from one chunk to the next
CLIP = 4.0  # standard deviations
AGED = 24.0  # frames that `lag` is counted in
PAST = 3  # earlier chunks whose mass is looked at on its own

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


MASSES = ("last", *(f"ago{back}" for back in range(1, PAST + 1)), "running", "total", "peak")
STATS = (*MASSES, "since", "birth", "key", "spread", "value", "motion", "logit", "top")
"""Numbers that are remembered of each frame, in this order."""


@dataclass(frozen=True)
class Seen:
    """What is remembered of the frames of one layer.

    Args:
        frames: Ids, ascending.
        stats: float32 ``[H, F, S]``, see :data:`STATS`.
        keys: Mean key before rotation of each frame, float32 ``[H, F, D]``.
        values: Mean value of each, float32 ``[H, F, D]``.
        query: Mean query before rotation of the newest chunk, float32 ``[H, D]``.
        chunks: Clean passes since the prompt switched.
        there: Which of them a head holds, bool ``[H, F]``.
    """

    frames: tuple[int, ...]
    stats: Tensor
    keys: Tensor
    values: Tensor
    query: Tensor
    chunks: int
    there: Tensor


def observe_frames(view: PassView, state: State, queries: int) -> None:
    """Look at a pass that makes frames final; in ``state["seen"][layer]``.

    Args:
        view: Of a clean pass; others are passed over.
        state: Of the part.
        queries: How many of the new frames' queries look, evenly spaced.
    """
    if not view.clean or not view.step.final:
        return
    update_query_means(view, state)
    old: Seen | None = state.setdefault("seen", {}).get(view.layer)
    mass, logit, top = _looked(view, queries)  # [H, F + n]
    held, tokens = len(view.frames), view.geometry.tokens
    frames = (*view.frames, *view.step.final)
    keys, values = (
        wide(x[:, view.final]).unflatten(1, (-1, tokens))
        for x in (view.own_keys("raw"), view.own_values())
    )
    lengths = keys.norm(dim=-1)
    mean_keys, mean_values = keys.mean(2), values.mean(2)
    stats = mass.new_zeros(view.heads, len(frames), len(STATS))
    if held:
        index = upload([old.frames.index(f) for f in view.frames], mass, torch.int64)
        stats[:, :held] = old.stats.index_select(1, index)
        mean_keys = torch.cat([old.keys.index_select(1, index), mean_keys], 1)
        mean_values = torch.cat([old.values.index_select(1, index), mean_values], 1)
    _remember(stats, mass, logit, top, held)
    column = STATS.index
    stats[:, held:, column("key")] = lengths.mean(2)
    stats[:, held:, column("spread")] = lengths.std(2, correction=0)
    stats[:, held:, column("value")] = values.norm(dim=-1).mean(2)
    before = _predecessors(mean_keys, held)
    stats[:, held:, column("motion")] = 1 - _cosine(mean_keys[:, held:], before)
    query = wide(view.raw_query[:, view.final]).mean(1)
    chunks = 1 if old is None else old.chunks + 1
    there = torch.ones_like(mass, dtype=torch.bool)
    there[:, :held] = view.present
    state["seen"][view.layer] = Seen(frames, stats, mean_keys, mean_values, query, chunks, there)


def _looked(view: PassView, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, mean logit and mean of the largest logit, each ``[H, F + n]``: held, then final."""
    tokens, first = view.geometry.tokens, view.final.start // view.geometry.tokens
    count = len(view.step.final)
    each = spread_rows(tokens, -(-queries // count), view.device)
    own = slice(first, first + count)
    view.scored += sum(view.lengths) * count * len(each)
    size = max(1, BLOCK // (view.heads * (len(view) + view.flight)))
    found = []
    for frame in range(first, first + count):
        for rows in (frame * tokens + each).split(size):
            logits = view.logits(view.query.index_select(1, rows), frame)
            looked = (logits.softmax(-1), "sum"), (logits, "mean"), (logits, "max")
            found.append(torch.stack([_by_frame(view, x, how, own) for x, how in looked]))
    mass, logit, top = torch.stack(found).sum(0) / (count * len(each))
    return mass, logit, top


def _by_frame(view: PassView, x: Tensor, how: str, own: slice) -> Tensor:
    """Values ``[H, r, N + P]`` put together over frames and summed over r, ``[H, F + n]``."""
    mine = x[..., len(view) :].unflatten(-1, (-1, view.geometry.tokens))[..., own, :]
    mine = {"sum": mine.sum(-1), "mean": mine.mean(-1), "max": mine.amax(-1)}[how]
    if not view.frames:
        return mine.sum(1)
    held = x[..., : len(view)].masked_fill(~view.valid.unsqueeze(1), 0.0)
    held = view.by_frame(held, how).masked_fill(~view.present.unsqueeze(1), 0.0)
    return torch.cat([held, mine], -1).sum(1)


def _remember(stats: Tensor, mass: Tensor, logit: Tensor, top: Tensor, held: int) -> None:
    """Go on with the masses of frames that were there, and begin those of the new, in place."""
    place, old = STATS.index, stats[:, :held].clone()
    now, new = mass[:, :held], mass[:, held:]
    stats[:, held:, : len(MASSES)] = new.unsqueeze(-1)
    stats[:, held:, place("birth")] = new
    stats[:, held:, place("running")] = (1 - DECAY) * new
    stats[..., place("logit")], stats[..., place("top")] = logit, top
    stats[:, :held, 0] = now
    stats[:, :held, 1 : 1 + PAST] = old[..., :PAST]
    stats[:, :held, place("running")] = DECAY * old[..., place("running")] + (1 - DECAY) * now
    stats[:, :held, place("total")] = old[..., place("total")] + now
    higher = now >= old[..., place("peak")]
    stats[:, :held, place("peak")] = torch.maximum(old[..., place("peak")], now)
    stats[:, :held, place("since")] = (old[..., place("since")] + 1).masked_fill(higher, 0.0)


def _predecessors(keys: Tensor, held: int) -> Tensor:
    """Mean key of the frame before each new one, ``[H, n, D]``; its own where there is none."""
    first = keys[:, held : held + 1] if not held else keys[:, held - 1 : held]
    return torch.cat([first, keys[:, held:-1]], 1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return (normalize(x, dim=-1) * normalize(y, dim=-1)).sum(-1)


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
class LookedAt:
    """Where the heads of all layers look together.

    Args:
        frames: Ids, ascending.
        last: Mean mass of the newest chunk in the heads that hold a frame, ``[F']``.
        running: Mean running mass in these heads, ``[F']``.
    """

    frames: tuple[int, ...]
    last: Tensor
    running: Tensor

    def at(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Last and running mass of some of the frames, ``[F]``."""
        index = upload([self.frames.index(f) for f in frames], self.last, torch.int64)
        return self.last.index_select(0, index), self.running.index_select(0, index)


def looked_at(state: State) -> LookedAt:
    """Where the heads of all layers looked in the last pass that was observed."""
    every: list[Seen] = list(state["seen"].values())
    frames = tuple(sorted({frame for own in every for frame in own.frames}))
    total = every[0].stats.new_zeros(3, len(frames))
    for own in every:
        there = own.there.to(total)
        index = upload([frames.index(f) for f in own.frames], total, torch.int64)
        masses = [
            (own.stats[..., STATS.index(name)] * there).sum(0) for name in ("last", "running")
        ]
        total[:, index] += torch.stack([*masses, there.sum(0)])
    last, running = total[:2] / total[2].clamp_min(1)
    return LookedAt(frames, last, running)


def frame_features(
    view: CacheView,
    state: State,
    others: LookedAt,
    names: Sequence[str],
    guard: Tensor,
    budget: Tensor,
) -> Listed:
    """Features of the frames that a layer holds, by the last clean pass.

    Args:
        view: Of the layer.
        state: In which :func:`observe_frames` has seen the passes.
        others: Where all layers look, from :func:`looked_at`.
        names: Which features, in this order.
        guard: bool ``[1 or H, F]``: frames that are kept in any case.
        budget: History frames of each head, ``[1 or H]``.
    """
    seen = aligned(state["seen"][view.layer], view.frames)
    candidate = (view.present & ~guard).expand(view.heads, -1)
    lag = lags(view).to(seen.stats)
    last, running = others.at(view.frames)
    there = candidate.any(0).to(last)
    looked = (running * there * lag).sum() / (running * there).sum().clamp_min(FLOOR)
    found = _masses(seen, candidate) | _content(view, seen, state, candidate)
    found |= {
        "age": lag.log1p(),
        "lag": lag / AGED,
        "others-mass": (last + FLOOR).log(),
        "others-running": (running + FLOOR).log(),
        "behind": (lag - looked) / 6,
    }
    shape = candidate.shape
    columns = [
        standardised(found[name].expand(shape), candidate).clamp(-CLIP, CLIP)
        if name in SCORED
        else found[name].expand(shape)
        for name in names
    ]
    context = _context(seen, candidate, budget.expand(len(candidate)), looked)
    return Listed(torch.stack(columns, -1).float(), context, candidate)


def lags(view: CacheView) -> Tensor:
    """Frames from each held frame to the start of the chunk that comes next, int64 ``[F]``."""
    step = view.step
    start = step.final[-1] + 1 if step.final and view.query is None else step.start
    return start - view.frame_ids


def aligned(seen: Seen, frames: tuple[int, ...]) -> Seen:
    """What is remembered of some of the frames, in their order."""
    if seen.frames == frames:
        return seen
    index = upload([seen.frames.index(f) for f in frames], seen.stats, torch.int64)
    names = ("stats", "keys", "values", "there")
    kept = {name: getattr(seen, name).index_select(1, index) for name in names}
    return replace(seen, frames=frames, **kept)


def forget_prompt(state: State) -> None:
    """A prompt switch: queries to come are no longer like those of the past."""
    state.pop("query_means", None)
    for layer, own in state.get("seen", {}).items():
        state["seen"][layer] = replace(own, chunks=0)


def _masses(seen: Seen, candidate: Tensor) -> dict[str, Tensor]:
    """Features from masses, each ``[H, F]``."""
    column = {name: seen.stats[..., place] for place, name in enumerate(STATS)}
    told = {name: (column[name] + FLOOR).log() for name in (*MASSES, "birth")}
    lower = column["running"].unsqueeze(2) > column["running"].unsqueeze(1)  # [H, F, F]
    count = candidate.sum(-1, keepdim=True).clamp_min(2)
    return {
        "last-mass": told["last"],
        **{f"mass-{back}": told[f"ago{back}"] for back in range(1, PAST + 1)},
        "running-mass": told["running"],
        "total-mass": told["total"],
        "peak-mass": told["peak"],
        "birth-mass": told["birth"],
        "since-peak": column["since"].log1p(),
        "trend": told["last"] - told["running"],
        "rank": (lower & candidate.unsqueeze(1)).sum(-1) / (count - 1),
        "key-norm": column["key"],
        "key-spread": column["spread"],
        "value-norm": column["value"],
        "motion": column["motion"],
        "logit": column["logit"],
        "max-logit": column["top"],
    }


def _content(view: CacheView, seen: Seen, state: State, candidate: Tensor) -> dict[str, Tensor]:
    """Features from mean keys, values and queries, each ``[H, F]``."""
    width, rotary = seen.keys.shape[-1] ** 0.5, view.geometry.rotary
    chunk = len(view.step.final) or view.query_frames
    means: QueryMeans = state["query_means"][view.layer]
    lag = lags(view).to(seen.keys).unsqueeze(0)
    near, far = (
        future_scores(means, seen.keys, lag, offsets, rotary, gate=0.0) / width
        for offsets in ((chunk, 2 * chunk), (3 * chunk, 4 * chunk))
    )
    keys, values = normalize(seen.keys, dim=-1), normalize(seen.values, dim=-1)
    there = view.present.expand(view.heads, -1)
    mean = (seen.keys * candidate.unsqueeze(-1)).sum(1, keepdim=True)
    return {
        "content-dot": torch.einsum("hd,hfd->hf", seen.query, seen.keys) / width,
        "future-near": near,
        "future-far": far,
        "novelty": 1 - (keys * normalize(mean, dim=-1)).sum(-1),
        "newer-key": _newer(keys, there),
        "newer-value": _newer(values, there),
        "neighbour": _next(keys, there),
    }


def _newer(unit: Tensor, there: Tensor) -> Tensor:
    """Largest cosine to a newer frame that the head holds, ``[H, F]``; 0 without any."""
    alike = unit @ unit.transpose(1, 2)  # [H, F, F]
    newer = torch.ones_like(alike, dtype=torch.bool).triu(1) & there.unsqueeze(1)
    best = alike.masked_fill(~newer, -torch.inf).amax(-1)
    return torch.where(best.isfinite(), best, 0.0)


def _next(unit: Tensor, there: Tensor) -> Tensor:
    """Cosine to the next newer frame that the head holds, ``[H, F]``; 0 without any."""
    count = unit.shape[1]
    place = torch.arange(count, device=unit.device)
    later = place.unsqueeze(0) > place.unsqueeze(1)  # [F, F]
    after = torch.where(later & there.unsqueeze(1), place, count).amin(-1)  # [H, F]
    index = after.clamp_max(count - 1).unsqueeze(-1).expand_as(unit)
    return _cosine(unit, unit.gather(1, index)).masked_fill(after == count, 0.0)


def _context(seen: Seen, candidate: Tensor, budget: Tensor, looked: Tensor) -> Tensor:
    """Numbers of each list, ``[H, C]``, as :data:`CONTEXT` names them."""
    mass, count = seen.stats[..., 0] * candidate, candidate.sum(-1).to(seen.stats)
    total = mass.sum(-1)
    share = mass / total.clamp_min(FLOOR).unsqueeze(-1)
    entropy = -(share * share.clamp_min(FLOOR).log()).sum(-1) / count.clamp_min(2).log()
    alike = torch.stack([looked / AGED, looked.new_full((), min(seen.chunks, 4) / 4)])
    own = [budget.to(total).log(), count.log1p(), entropy, (total + FLOOR).log()]
    return torch.cat([torch.stack(own, -1), alike.expand(len(total), -1)], -1).float()
