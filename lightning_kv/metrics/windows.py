"""Features of consecutive windows of a clip, taken while its frames go by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_kv.metrics.backbones.base import Backbone

FRAMES = 16  # of a window, where the backbone sees frames one by one


class WindowEncoder(nn.Module):
    """A backbone, and how many frames it is shown at a time.

    Args:
        backbone: Of clips, or of frames.
        length: Frames of a window; of a backbone of clips those that it takes, else 16 by default.

    Attributes:
        name: That of the backbone, with the length where it is not the usual one.

    Example:
        >>> from lightning_kv.metrics.backbones.base import RandomBackbone
        >>> WindowEncoder(RandomBackbone(2)).name, WindowEncoder(RandomBackbone(2), 4).name
        ('random-2dconv', 'random-2dconv:4f')
    """

    def __init__(self, backbone: Backbone, length: int | None = None) -> None:
        super().__init__()
        usual = backbone.clip_len or FRAMES
        self.backbone, self.length = backbone, length or usual
        self.name = backbone.name + (f":{self.length}f" if self.length != usual else "")

    @property
    def recipe(self) -> str:
        """How the features of the windows of clips are made, in a sentence."""
        mean = "" if self.backbone.clip_len else ", mean over the frames of a window"
        return (
            f"{self.backbone.recipe}{mean}; consecutive windows without overlap, context and "
            "remainder left out, pooled over clips"
        )

    def windows(self, skip: int = 0) -> Windows:
        """What takes the features of one clip, whose first frames may not count."""
        return Windows(self, skip)


class Windows:
    """Collects the features of a clip's windows; holds the frames of one window.

    Windows follow each other without overlap from the first frame that counts; the frames that are
    left at the end are too few for a window and have no feature. A backbone that sees single
    frames gives the mean of its features over a window.

    Args:
        encoder: What they are shown to.
        skip: Leading frames that do not count.

    Example:
        >>> from lightning_kv.metrics.backbones.base import RandomBackbone
        >>> windows = Windows(WindowEncoder(RandomBackbone(3)), skip=1)
        >>> for block in torch.zeros(20, 3, 16, 16).split(6):
        ...     windows.add(block)
        >>> windows.features().shape
        torch.Size([2, 32])
    """

    def __init__(self, encoder: WindowEncoder, skip: int = 0) -> None:
        self.backbone, self.length, self.skip = encoder.backbone, encoder.length, skip
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
