"""What the parts share that rank by a scorer: they look at clean passes, and ask it once a chunk.

Shapes: H heads, F frames, N lists, U places of a list.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.scored import ScoredPart
from lightning_kv.policies.scorer.artifact import ScorerFile, check_model, student_on
from lightning_kv.policies.scorer.features import Listed, frame_features
from lightning_kv.policies.scorer.seen import forget_prompt, observe_frames

State = dict[Any, Any]


@dataclass(frozen=True)
class RanksByScorer(ScoredPart):
    """What the parts have in common that rank by a scorer, whatever they do with the order.

    Args:
        scorer: File (.safetensors), or ``auto``: the one that is shipped for the model.
        transfer: Take a scorer that was taught with another chunk or token grid.
    """

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    scorer: ScorerFile = ScorerFile()  # noqa: RUF009  frozen
    transfer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scorer", ScorerFile.of(self.scorer))

    @property
    def comparable(self) -> bool:
        """Ranks within a head are all that it was taught."""
        return False

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The scorer is of such a model; of one that was taught on another it is said."""
        if said := check_model(self.scorer.scorer(geometry), geometry, self.transfer):
            warnings.warn(said, stacklevel=2)

    def observe(self, view: PassView, state: State) -> None:
        """What the frames that become final look at."""
        observe_frames(view, state, self.scorer.scorer(view.geometry).queries)

    def event(self, event: Event, views: list[CacheView], state: State) -> None:
        """A prompt switch forgets the queries of the old prompt."""
        if event.kind == "prompt_switch":
            forget_prompt(state)


def scores_of(part: RanksByScorer, views: Sequence[CacheView], state: State) -> list[Tensor]:
    """What the scorer of a part says of the frames of some layers, each ``[H, 1, F]``.

    Raises:
        ValueError: Frames have become final without a clean pass.
    """
    if not views:
        return []
    if "seen" not in state or state.get("noisy"):
        raise ValueError(
            f"{named(part, views[0])} looks at clean passes, and frames have become final without "
            "one. Use a sampler that commits frames in a pass at t = 0."
        )
    scorer = part.scorer.scorer(views[0].geometry)
    listed = lists_of(part, views, state, scorer.features)
    state["scorer"] = student_on(scorer, views[0].device)
    found = asked(state["scorer"], views, listed)
    return [own.unsqueeze(1) for own in found]


def lists_of(
    part: ScoredPart, views: Sequence[CacheView], state: State, names: Sequence[str]
) -> list[Listed]:
    """Features of the frames of some layers, at a commit or in a pass.

    Args:
        part: Whose budget and protected frames count.
        views: Of the layers.
        state: Of the part.
        names: Which features.
    """
    guards = [part.protected(view, view.frame_ids)[:, 0] for view in views]
    return frame_features(views, state, names, guards, [budget_of(part, view) for view in views])


def budget_of(part: ScoredPart, view: CacheView) -> Tensor:
    """History frames of each head, ``[1 or H]``; the mean where they depend on scores."""
    rows = part.rows(view)
    tokens = view.geometry.tokens
    frames = (part.budget.layer_mean(view),) if rows is None else [own / tokens for own in rows]
    return upload(frames, view.frame_ids, torch.float32)


def asked(
    student: torch.nn.Module, views: Sequence[CacheView], listed: Sequence[Listed]
) -> list[Tensor]:
    """Scores of the frames of each layer, ``[H, F]``; the student runs once for all of them.

    Frames that are no candidates score lowest; those a head must keep are kept all the same.
    """
    most, heads = max(len(view.frames) for view in views), views[0].heads
    features, candidate = (
        torch.cat([_padded(x, most) for x in every])
        for every in zip(*((own.features, own.candidate) for own in listed), strict=True)
    )
    context = torch.cat([own.context for own in listed])
    like = views[0].frame_ids
    layer = upload([v.layer for v in views for _ in range(heads)], like, torch.int64)
    head = upload([*range(heads)] * len(views), like, torch.int64)
    scores = student(features, context, layer, head, candidate)
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(candidate, scores, lowest)
    return [
        own[:, : len(view.frames)] for own, view in zip(scores.split(heads), views, strict=True)
    ]


def _padded(x: Tensor, most: int) -> Tensor:
    """``[H, F, ...]`` with places up to ``most`` behind its own."""
    blank = x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])
    return torch.cat([x, blank], 1)
