"""Two-stream teacher forcing: noisy chunks read a clean history, without a 2T x 2T mask.

Source: the training scheme of CausVid (arXiv 2412.07772) and Self Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import rotate_by


@dataclass
class ForcingSession:
    """Answers self-attention in training; the model is the same as in a rollout.

    A ``commit`` pass is the clean stream: chunk i reads clean chunks 0 to i and leaves its keys and
    values here. A ``denoise`` pass is the noisy streams (M per clean one, batch-major): chunk i
    reads the clean chunks before it, and itself.

    Args:
        geometry: Of the model.
        chunk: Latent frames per chunk.
        visible: Per chunk, the earlier chunks it may read (history dropout).
        head_scale: ``[B, L, H]`` factor on each head's output (head dropout), or None.
    """

    geometry: Geometry
    chunk: int
    visible: list[list[int]]
    head_scale: Tensor | None = None
    clean: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames, (rows, columns) = self.chunk * len(self.visible), self.geometry.grid
        time = torch.arange(frames).repeat_interleave(rows * columns)
        row = torch.arange(rows).repeat_interleave(columns).repeat(frames)
        column = torch.arange(columns).repeat(rows * frames)
        angles = self.geometry.rotary.angles(time, row, column)
        self.trig = angles.cos().float(), angles.sin().float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention ``[B, T, H, D]`` of a whole sequence under the scheme above."""
        cos, sin = (part.to(q.device) for part in self.trig)
        q, k = (rotate_by(x.transpose(1, 2), cos, sin) for x in (q, k))  # [B, H, T, D]
        v = v.transpose(1, 2)
        split = self.chunk * self.geometry.tokens
        q_chunks, k_chunks, v_chunks = (x.split(split, dim=2) for x in (q, k, v))
        if step.phase == "commit":
            self.clean[layer] = k, v
            past_k, past_v = k_chunks, v_chunks
        else:
            past_k, past_v = (
                x.repeat_interleave(len(q) // len(x), 0).split(split, dim=2)
                for x in self.clean[layer]
            )
        out = [
            scaled_dot_product_attention(
                query,
                torch.cat([*(past_k[j] for j in seen), k_chunks[i]], dim=2),
                torch.cat([*(past_v[j] for j in seen), v_chunks[i]], dim=2),
            )
            for i, (query, seen) in enumerate(zip(q_chunks, self.visible, strict=True))
        ]
        joined = torch.cat(out, dim=2)
        if self.head_scale is not None:
            scale = self.head_scale[:, layer].repeat_interleave(len(q) // len(self.head_scale), 0)
            joined = joined * scale[:, :, None, None]
        return joined.transpose(1, 2)
