"""What every head keeps and reads, chunk by chunk: the raw material of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.view import PassView


@dataclass
class _Seen:
    """One layer in one chunk: frames, what is held of them, and reads summed over passes."""

    frames: Tensor
    held: Tensor
    weight: Tensor
    read: Tensor
    passes: int = 0


class Trace:
    """Watches a session (``rollout(..., watch=Trace())``) and remembers shares, not rows.

    Only the ``cond`` namespace is watched. Nothing leaves the device before :meth:`arrays`.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, int], _Seen] = {}
        self._frames = 0

    def __call__(self, view: PassView) -> None:
        """Note one pass of one layer."""
        step = view.step
        if step.namespace != "cond" or step.rebuild:
            return
        self._frames = max(self._frames, step.frames[-1] + 1)
        key = (view.sample, step.chunk, view.layer)
        if key not in self._seen:
            heads, tokens = view.heads, view.geometry.tokens
            rows = view.rows_per_frame.float().expand(heads, -1) / tokens
            weight = view.by_frame(view.weight.unsqueeze(1))[:, 0].expand(heads, -1) / tokens
            self._seen[key] = _Seen(view.frame_ids, rows, weight, rows.new_zeros(1, 1, 1))
        seen = self._seen[key]
        seen.passes += 1
        seen.read = _together(seen.read, self._share(view, seen.held))

    def _share(self, view: PassView, held: Tensor) -> Tensor:
        """Rows read of each frame ÷ tokens of a frame, ``[H, Q or 1, F]``."""
        mask, _ = view.read
        if mask is None:
            return held.unsqueeze(1)
        share = view.by_frame(mask.float()) / view.geometry.tokens
        return share.expand(view.heads, -1, -1)

    def arrays(self, sample: int) -> dict[str, Any]:
        """Shares of one sample, as numpy arrays.

        C chunks, L layers, H heads, Q query frames of a chunk, F frames.

        Returns:
            ``held`` uint8 ``[C, L, H, F]``: 255 x rows held while the chunk is denoised ÷ tokens
            of a frame. ``weight`` float16, alike: tokens that these rows stand for.
            ``read`` uint8 ``[C, Q, L, H, F]``: 255 x rows read ÷ tokens, mean over the passes.
        """
        own = {key[1:]: seen for key, seen in self._seen.items() if key[0] == sample}
        chunks, layers = (1 + max((k[i] for k in own), default=-1) for i in (0, 1))
        heads = max((len(seen.held) for seen in own.values()), default=0)
        asked = max((seen.read.shape[1] for seen in own.values()), default=1)
        held = torch.zeros(chunks, layers, heads, self._frames)
        weight, read = held.clone(), torch.zeros(chunks, asked, *held.shape[1:])
        for (chunk, layer), seen in own.items():
            frames = seen.frames.cpu()
            held[chunk, layer][:, frames] = seen.held.cpu()
            weight[chunk, layer][:, frames] = seen.weight.cpu()
            share = seen.read / seen.passes
            if share.shape[1] not in (1, asked):
                share = share.mean(1, keepdim=True)
            share = share.expand(heads, asked, len(frames))
            read[chunk, :, layer][:, :, frames] = share.transpose(0, 1).cpu()
        return {
            "held": _bytes(held).numpy(),
            "read": _bytes(read).numpy(),
            "weight": weight.half().numpy(),
        }


def _together(total: Tensor, share: Tensor) -> Tensor:
    """Add reads; where query frames differ in number, those of the pass count on average."""
    if 1 not in (total.shape[1], share.shape[1]) and total.shape[1] != share.shape[1]:
        share = share.mean(1, keepdim=True)
    return total + share


def _bytes(share: Tensor) -> Tensor:
    return (255 * share.clamp(0, 1)).round().to(torch.uint8)
