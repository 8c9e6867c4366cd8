"""Reference tables of what each frame gives to a head's output.

Shapes: H heads, E sampled queries of a chunk, R of a pass, F frames, N held rows, P rows in flight,
D head width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.recorder import LIMIT, Clip, Recorder, weight_of
from lightning_kv.cache.view import PassView


@dataclass
class Outputs:
    """What some queries of one chunk and layer got from each frame.

    With a softmax over all frames, ``share`` p and the output a; ``pull`` is p (o - a), where o is
    the output of the frame alone. Over all frames the shares sum to 1 and the pulls to 0, and the
    output over a set of frames K is ``a + sum of pulls in K / sum of shares in K``. A frame that
    was not there in a pass has no share in it.

    Args:
        frames: Ids of all frames that were there in any pass, ascending; those in flight too.
        share: ``[H, E, F']``.
        pull: ``[H, E, F', D]``.
        weight: Of each query, ``[E]``.
    """

    frames: tuple[int, ...]
    share: Tensor
    pull: Tensor
    weight: Tensor


@dataclass
class FrameOutputs:
    """What each frame gave to the output of some queries of every chunk.

    Args:
        clip: Whose it is.
        outputs: By namespace, chunk and layer.
        queries: That it was recorded with.
    """

    clip: Clip
    outputs: dict[tuple[str, int, int], Outputs]
    queries: int


class OutputRecorder(Recorder):
    """Shares and outputs by frame of a few queries of every pass, in float32.

    From them the error of a head's output under any set of frames follows exactly.

    Args:
        queries: Of each pass, evenly spaced, others in each pass of a chunk.
        limit: See :class:`Recorder`.
    """

    name, makes = "outputs", FrameOutputs

    def __init__(self, queries: int = 4, limit: int = LIMIT) -> None:
        super().__init__(queries, limit)
        self._seen: dict[tuple[int, str, int, int], list[Outputs]] = defaultdict(list)

    def size(self, clip: Clip) -> int:
        """4 x (D + 1) bytes for each query, layer, head and frame so far, and its weight."""
        of = clip.geometry
        flight, ends = max(of.chunk, of.flight), [clip.frames] * clip.chunks
        if of.chunk:
            ends = [min(clip.frames, c * of.chunk + flight) for c in range(clip.chunks)]
        each = 4 * of.layers * of.branches * clip.passes * self.queries
        return each * (sum(ends) * of.heads * (of.head_dim + 1) + clip.chunks)

    def note(self, view: PassView) -> None:
        """Take the frames' outputs for some queries."""
        step, count, passes = view.step, view.query.shape[1], self.clips[view.sample].passes
        rows = min(self.queries, count)
        turn = step.step % passes if step.phase == "denoise" else passes - 1
        later = turn * count // (rows * passes)
        chosen = [(r * count // rows + later) % count for r in range(rows)]
        index = upload(chosen, view.query, torch.int64)
        share, output = [], []
        values = torch.cat([view.values(), view.own_values()], 1).float()
        for place, row in zip(chosen, index.split(1), strict=True):
            frame = place * len(step.frames) // count
            mass = view.logits(view.query.index_select(1, row), frame).softmax(-1)  # [H, 1, N + P]
            share.append(self._by_frame(view, mass))
            output.append(self._by_frame(view, mass.transpose(1, 2).mul(values).transpose(1, 2)))
        p = torch.cat(share, 1)  # [H, R, F]
        u = torch.stack(output, 1).transpose(2, 3)  # [H, R, F, D]
        pull = u - p.unsqueeze(-1) * u.sum(2, keepdim=True)
        weight = torch.full((rows,), weight_of(step), device=view.device)
        seen = Outputs((*view.frames, *step.frames), p.float(), pull.float(), weight)
        self._seen[view.sample, step.namespace, step.chunk, view.layer].append(seen)

    def _by_frame(self, view: PassView, values: Tensor) -> Tensor:
        """Sums over the rows of each held frame and of each in flight, ``[H, ., F]``."""
        held, own = values[..., : len(view)], values[..., len(view) :]
        own = own.unflatten(-1, (len(view.step.frames), -1)).sum(-1)
        return torch.cat([view.by_frame(held), own], -1) if view.frames else own

    def table(self, sample: int) -> FrameOutputs:
        """The queries of all passes of each chunk, together."""
        places = [place for place in self._seen if place[0] == sample]
        found = {place[1:]: _together(self._seen.pop(place)) for place in places}
        return FrameOutputs(self.clips[sample], found, self.queries)


def _together(seen: list[Outputs]) -> Outputs:
    """Queries of several passes; what is held, or in flight, may change between them."""
    frames = tuple(sorted({frame for one in seen for frame in one.frames}))
    share, pull = [], []
    for one in seen:
        p, own = one.share, one.pull
        if one.frames != frames:
            index = upload([frames.index(f) for f in one.frames], p, torch.int64)
            p = p.new_zeros(*p.shape[:2], len(frames)).index_copy(2, index, p)
            blank = own.new_zeros(*own.shape[:2], len(frames), own.shape[3])
            own = blank.index_copy(2, index, own)
        share.append(p)
        pull.append(own)
    weight = torch.cat([one.weight for one in seen])
    return Outputs(frames, torch.cat(share, 1), torch.cat(pull, 1), weight)
