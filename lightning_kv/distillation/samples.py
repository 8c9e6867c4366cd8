"""From rollouts that were watched to lists: what was seen at each commit, and what it was worth.

Shapes: N lists, U places of a list, H heads, F frames that a layer holds, R queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kv.distillation.collect import Watched
from lightning_kv.distillation.labels import OutputProblem, Teacher, output_problems, targets
from lightning_kv.distillation.lists import Lists, concatenated

FEWEST = 2  # candidates among which there is something to choose


def lists_of_clip(
    watched: Sequence[Watched],
    tables: Mapping[str, Any],
    teacher: Teacher,
    key: str,
    queries: int = 4,
    clip: int = 0,
) -> Lists | None:
    """Lists of all commits of a rollout that its teacher can say something of; None without any.

    Args:
        watched: What was seen at each.
        tables: Of what comes after, by name, as the teacher needs them.
        teacher: Says what frames are worth.
        key: Of the clip; draws of queries depend on it.
        queries: How many later queries' outputs go along, where the teacher has recorded any.
        clip: Number of the clip.
    """
    found = []
    for own in watched:
        weight = teacher.weight(tables["mass"].clip, own.decision.chunk)
        if not weight:
            continue
        worth = targets(teacher, tables, own.decision)
        problems: Sequence[OutputProblem | None] = [None] * len(worth)
        if queries and "outputs" in tables:
            problems = output_problems(teacher, tables["outputs"], own.decision, queries, key)
        for place in range(len(worth)):
            lists = _lists_of_layer(own, place, worth[place], problems[place], weight, clip)
            found += [lists] if len(lists) else []
    return concatenated(found) if found else None


def _lists_of_layer(
    watched: Watched,
    place: int,
    worth: Tensor,
    problem: OutputProblem | None,
    weight: float,
    clip: int,
) -> Lists:
    """Lists of the heads of one layer, candidates first, the oldest to the newest."""
    listed, where = watched.listed[place], watched.decision.places[place]
    guard = watched.decision.guards[place]
    candidate = listed.candidate
    heads, count = len(candidate), candidate.sum(-1)
    order = (~candidate).to(torch.int8).argsort(dim=-1, stable=True)  # [H, F]
    order = order[:, : max(1, int(count.max()))]
    inside = candidate.gather(1, order)
    kept = (guard & where.present).expand(heads, -1).sum(-1)
    keep = (watched.budget[place].expand(heads).floor().long() - kept).clamp_min(0)
    spread = order.unsqueeze(-1).expand(-1, -1, listed.features.shape[-1])
    found = {
        "features": listed.features.gather(1, spread).masked_fill(~inside.unsqueeze(-1), 0.0),
        "context": listed.context,
        "candidate": inside,
        "target": worth.float().gather(1, order).masked_fill(~inside, 0.0),
        "layer": torch.full_like(keep, where.layer),
        "head": torch.arange(heads, device=keep.device),
        "clip": torch.full_like(keep, clip),
        "weight": torch.full((heads,), weight, device=keep.device),
        "keep": keep,
    }
    if problem is not None:
        found |= _ordered(problem, order, inside)
    return Lists(**found).select(count >= FEWEST)


def _ordered(problem: OutputProblem, order: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """The same problem with the places of a list; all that is read anyway stays last."""
    last = torch.full_like(order[:, :1], problem.share.shape[-1] - 1)
    index = torch.cat([order, last], 1)  # [H, U + 1]
    real = torch.cat([inside, torch.ones_like(last, dtype=torch.bool)], 1)
    heads, queries, width = len(index), problem.share.shape[1], index.shape[1]
    line = index.unsqueeze(1).expand(-1, queries, -1)
    share = problem.share.gather(2, line) * real.unsqueeze(1)
    rows = line.unsqueeze(-1).expand(-1, -1, -1, problem.gram.shape[-1])
    gram = problem.gram.gather(2, rows)
    gram = gram.gather(3, line.unsqueeze(2).expand(heads, queries, width, width))
    gram = gram * (real.unsqueeze(1).unsqueeze(-1) & real.unsqueeze(1).unsqueeze(2))
    return {"share": share.float(), "gram": gram.float(), "query": problem.query.float()}
