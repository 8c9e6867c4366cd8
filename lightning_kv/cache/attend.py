"""Attention over a decision. Kernels have names; their results differ by rounding alone.

In float32 that is no more than 1e-5 of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""``(q [h, T, D], k [h, N, D], v [h, N, D], read [h, Q, N] or None, bias [h, Q, N] or None)``.

``read`` says which rows each block of T / Q queries sees. Gives ``[h, T, D]``.
"""


def sdpa(q: Tensor, k: Tensor, v: Tensor, read: Tensor | None, bias: Tensor | None) -> Tensor:
    """Torch's fused kernel; rows that are not read are not touched.

    Streams (a head and a block of queries) that read equally many rows run as one batch.
    """
    if read is None:
        mask = None if bias is None else _blocks(bias, q.shape[1])
        return _fused(q, k, v, mask)
    heads, blocks = read.shape[:2]
    query = q.unflatten(1, (blocks, -1)).flatten(0, 1)  # [h * Q, T / Q, D]
    flat = read.flatten(0, 1)
    counts = flat.sum(-1)
    out = torch.empty_like(query)
    for count in counts.unique().tolist():
        streams = (counts == count).nonzero().flatten()
        rows = flat[streams].nonzero()[:, 1].view(len(streams), count)
        head = (streams // blocks).unsqueeze(1)
        mask = None
        if bias is not None:
            mask = bias.flatten(0, 1)[streams].gather(1, rows).unsqueeze(1)
        out[streams] = _fused(query[streams], k[head, rows], v[head, rows], mask)
    return out.unflatten(0, (heads, blocks)).flatten(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, read: Tensor | None, bias: Tensor | None) -> Tensor:
    """Full scores, a mask and a softmax in float64: slow and obviously right."""
    logits = q.double() @ k.double().transpose(1, 2) / k.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + _blocks(bias, q.shape[1])
    if read is not None:
        logits = logits.masked_fill(~_blocks(read, q.shape[1]), -torch.inf)
    return (logits.softmax(-1) @ v.double()).to(q.dtype)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "reference": reference}


def known_backend(name: str) -> Kernel:
    """The kernel of a name.

    Raises:
        ValueError: No kernel of that name.
    """
    if name not in KERNELS:
        raise ValueError(
            f"No attention backend {name!r}. Backends here: {', '.join(sorted(KERNELS))}."
        )
    return KERNELS[name]


def _blocks(per_block: Tensor, tokens: int) -> Tensor:
    """``[h, Q, N]`` to one row per query, ``[h, T, N]``."""
    return per_block.repeat_interleave(tokens // per_block.shape[1], dim=1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    extra = None if mask is None else mask.to(q.dtype).unsqueeze(0)
    return scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), extra)[0]
