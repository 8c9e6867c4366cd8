"""Reference tables of what each frame gives to a head's output.

Shapes: H heads, E sampled queries of a chunk, R of a pass, F frames, N held rows, P rows in flight,
D head width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.recorder import LIMIT, Clip, Recorder, weight_of
from lightning_kv.cache.view import PassView


@dataclass
class Outputs:
    """What some queries of one chunk and layer got from each frame.

    With a softmax over all frames, ``share`` p and the output a; ``pull`` is p (o - a), where o is
    the output of the frame alone. Over all frames the shares sum to 1 and the pulls to 0, and the
    output over a set of frames K is ``a + sum of pulls in K / sum of shares in K``.

    Args:
        frames: Ids of the frames, those of the chunk itself last.
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
    """

    clip: Clip
    outputs: dict[tuple[str, int, int], Outputs]


class OutputRecorder(Recorder):
    """Shares and outputs by frame of a few queries of every pass.

    From them the error of a head's output under any set of frames follows exactly.

    Args:
        queries: Of each pass, evenly spaced, others in each pass of a chunk.
        limit: See :class:`Recorder`.
    """

    name = "outputs"

    def __init__(self, queries: int = 4, limit: int = LIMIT) -> None:
        super().__init__(limit)
        self.queries = queries
        self._seen: dict[tuple[int, str, int, int], list[Outputs]] = defaultdict(list)

    def size(self, clip: Clip) -> int:
        """4 x (D + 1) bytes for each query, layer, head and frame so far."""
        of = clip.geometry
        each = 4 * (of.head_dim + 1) * of.layers * of.heads * of.branches
        return each * clip.passes * self.queries * clip.frames * (clip.chunks + 1) // 2

    def note(self, view: PassView) -> None:
        """Take the frames' outputs for some queries."""
        step, count, passes = view.step, view.query.shape[1], self.clips[view.sample].passes
        rows = min(self.queries, count)
        turn = step.step % passes if step.phase == "denoise" else passes - 1
        index = torch.arange(rows, device=view.device) * count // rows
        index = (index + turn * count // (rows * passes)) % count
        frame = index // (count // len(step.frames)) if view.apart else torch.zeros_like(index)
        share, output = [], []
        values = torch.cat([view.values(), view.own_values()], 1).float()
        for row, at in zip(
            index.split(1), frame.tolist() if view.apart else [0] * rows, strict=True
        ):
            mass = view.logits(view.query.index_select(1, row), at).softmax(-1)  # [H, 1, N + P]
            share.append(self._by_frame(view, mass))
            output.append(self._by_frame(view, mass.transpose(1, 2).mul(values).transpose(1, 2)))
        p = torch.cat(share, 1)  # [H, R, F]
        u = torch.stack(output, 1).transpose(2, 3)  # [H, R, F, D]
        pull = u - p.unsqueeze(-1) * u.sum(2, keepdim=True)
        weight = p.new_full((rows,), weight_of(step))
        seen = Outputs((*view.frames, *step.frames), p, pull, weight)
        self._seen[view.sample, step.namespace, step.chunk, view.layer].append(seen)

    def _by_frame(self, view: PassView, values: Tensor) -> Tensor:
        """Sums over the rows of each held frame and of each in flight, ``[H, ., F]``."""
        held, own = values[..., : len(view)], values[..., len(view) :]
        own = own.unflatten(-1, (len(view.step.frames), -1)).sum(-1)
        return torch.cat([view.by_frame(held), own], -1) if view.frames else own

    def table(self, sample: int) -> FrameOutputs:
        """The queries of all passes of each chunk, together."""
        found = {}
        for (owner, *place), seen in self._seen.items():
            if owner == sample:
                last = seen[-1].frames
                same = [one for one in seen if one.frames == last]  # memory may change in a chunk
                found[tuple(place)] = Outputs(
                    last,
                    torch.cat([one.share for one in same], 1),
                    torch.cat([one.pull for one in same], 1),
                    torch.cat([one.weight for one in same]),
                )
        return FrameOutputs(self.clips[sample], found)
