"""RAFT: where every pixel of a frame has gone in the next one.

Teed and Deng, RAFT: Recurrent All-Pairs Field Transforms for Optical Flow (arXiv 2003.12039), as
torchvision has it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.metrics.backbones.i3d import load_exactly
from lightning_kv.metrics.backbones.weights import load_state, published, verified

ITERATIONS = 20  # VBench's
MULTIPLE = 8
SMALLEST = 128  # pixels; below, the coarsest correlations have no extent


class RAFT(Backbone):
    """Optical flow with torchvision's ``raft_large``.

    The published weights C_T_V1 are the authors' ``raft-things`` in another container, so flows are
    those of VBench. Frames whose sides are no multiple of 8 are padded on both sides with what is
    at their border, and the flow of the padding is cut off; VBench leaves it on, which makes no
    difference to frames that need none.

    Args:
        net: Takes two frames ``[N, 3, H, W]`` in [-1, 1] and ``num_flow_updates``; gives the flow
            ``[N, 2, H, W]`` after each update.
        sha256: Checksum of the file that the weights are from.
    """

    name = "raft-large"
    num_features = 2
    comparable = True
    recipe = (
        f"torchvision raft_large C_T_V1, {ITERATIONS} iterations, input [-1,1] not rounded, sides "
        f"padded to multiples of {MULTIPLE} (replicate, both sides) and cropped, float32"
    )

    def __init__(self, net: nn.Module, sha256: str | None = None) -> None:
        super().__init__()
        self.net, self.weights_sha256 = net, sha256
        self.freeze()

    @classmethod
    def load(cls, path: Path | str) -> RAFT:
        """The network with weights from a file such as ``raft_large_C_T_V1-22a6c225.pth``.

        Raises:
            ValueError: The file is not that of this network.
        """
        from torchvision.models.optical_flow import raft_large

        sha256 = verified(path, published(cls.name))
        net = raft_large(weights=None, progress=False)
        load_exactly(net, load_state(path), path)
        return cls(net, sha256)

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from the first frames to the second, in pixels.

        Args:
            first: ``[N, 3, H, W]`` in [0, 1], sides of at least 128 pixels.
            second: The same shape and range.

        Returns:
            float32 ``[N, 2, H, W]``: to the right, and down.

        Raises:
            ValueError: The frames are too small.
        """
        if min(first.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"RAFT cannot see motion in frames of {first.shape[-2]} x {first.shape[-1]} "
                f"pixels. Pass frames of at least {SMALLEST} x {SMALLEST}, or measure their "
                "change with frame_change."
            )
        pair = torch.cat([first, second]).float()
        sides = margins(*pair.shape[-2:], MULTIPLE)
        pair = 2 * F.pad(pair, sides, mode="replicate") - 1
        flow = self.net(*pair.chunk(2), num_flow_updates=ITERATIONS)[-1]
        return cropped(flow, sides)


def margins(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """What to add left, right, above and below so that both sides are multiples.

    Args:
        height: In pixels.
        width: In pixels.
        multiple: In pixels.

    Example:
        >>> margins(480, 829, 8)
        (1, 2, 0, 0)
    """
    down, across = -height % multiple, -width % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2


def cropped(frames: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    """Take off again what :func:`margins` said to add.

    Args:
        frames: ``[..., H, W]``.
        sides: What was added left, right, above and below.

    Example:
        >>> cropped(torch.zeros(1, 8, 8), (1, 2, 0, 0)).shape
        torch.Size([1, 8, 5])
    """
    left, right, above, below = sides
    height, width = frames.shape[-2:]
    return frames[..., above : height - below, left : width - right]
