"""Features of consecutive windows of a clip, taken while its frames go by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.metrics.backbones.base import Backbone

FRAMES = 16  # of a window, where the backbone sees frames one by one


class Windows:
    """Collects the features of a clip's windows; holds the frames of one window.

    Windows follow each other without overlap from the first frame that counts; the frames that are
    left at the end are too few for a window and have no feature. A backbone that sees single
    frames gives the mean of its features over a window.

    Args:
        backbone: Of clips, or of frames.
        skip: Leading frames that do not count.
        length: Frames of a window; of a backbone of clips those that it takes, else 16 by default.

    Example:
        >>> from lightning_kv.metrics.backbones.base import RandomBackbone
        >>> windows = Windows(RandomBackbone(3), skip=1)
        >>> for block in torch.zeros(20, 3, 16, 16).split(6):
        ...     windows.add(block)
        >>> windows.features().shape
        torch.Size([2, 32])
    """

    def __init__(self, backbone: Backbone, skip: int = 0, length: int | None = None) -> None:
        self.backbone, self.skip = backbone, skip
        self.length = length or backbone.clip_len or FRAMES
        self.held: list[Tensor] = []
        self.found: list[list[float]] = []  # no tensors, which would split the free memory

    def add(self, pixels: Tensor) -> None:
        """Take in the next frames, ``[f, 3, H, W]`` in [0, 1]."""
        skipped = min(self.skip, len(pixels))
        self.skip -= skipped
        for frame in pixels[skipped:]:
            self.held.append(frame)
            if len(self.held) == self.length:
                self.found.append(self._feature(torch.stack(self.held)).tolist())
                self.held = []

    def features(self) -> Tensor:
        """Float32 ``[windows, d]`` on the CPU; no rows where the clip is shorter than a window."""
        return torch.tensor(self.found, dtype=torch.float32).view(
            len(self.found), self.backbone.num_features
        )

    @torch.no_grad()
    def _feature(self, frames: Tensor) -> Tensor:
        place = next((p.device for p in self.backbone.parameters()), frames.device)
        frames = frames.to(place)
        if self.backbone.clip_len is None:
            return self.backbone(frames).float().mean(0)
        return self.backbone(frames.unsqueeze(0))[0].float()
