"""What imagines the frame between two others, and what scores a single one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.metrics.backbones.i3d import load_exactly
from lightning_kv.metrics.backbones.raft import cropped, margins
from lightning_kv.metrics.backbones.weights import (
    WeightsUnavailable,
    load_state,
    published,
    verified,
)

MULTIPLE = 16
LONGEST = 512  # pixels of the longer side that MUSIQ is shown


class LinearMidpoint(Backbone):
    """The mean of both frames: needs no weights, knows nothing of motion, and is not VBench's.

    Example:
        >>> black = torch.zeros(1, 3, 2, 2)
        >>> LinearMidpoint()(black, black + 1).mean().item()
        0.5
    """

    name = "linear-midpoint"
    num_features = 3
    recipe = "mean of the two frames (no interpolation network: not the number of VBench)"

    @classmethod
    def load(cls, path: Path | str | None = None) -> LinearMidpoint:
        """The same as the constructor: there is nothing to load."""
        return cls()

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The frames between.

        Args:
            first: ``[N, 3, H, W]``.
            second: The same shape.
        """
        return (first + second) / 2


class AMT(Backbone):
    """AMT-S (Li et al., arXiv 2304.09790), from a TorchScript file that the user has exported.

    The project publishes weights for its own code, whose licence forbids commercial use; neither is
    part of this package. Loading the exported file runs the code in it.

    Args:
        net: Takes two frames ``[N, 3, H, W]`` in [0, 1], sides multiples of 16; gives the one
            half-way between.
        sha256: Checksum of the file that it is from.
    """

    name = "amt-s"
    num_features = 3
    comparable = True
    recipe = (
        f"AMT-S from an exported TorchScript file, full resolution, sides padded to multiples of "
        f"{MULTIPLE} (replicate, both sides) and cropped"
    )

    def __init__(self, net: nn.Module, sha256: str | None = None) -> None:
        super().__init__()
        self.net, self.weights_sha256 = net, sha256
        self.freeze()

    @classmethod
    def load(cls, path: Path | str) -> AMT:
        """The network of an exported file; runs the code in it.

        Raises:
            ValueError: The file is not TorchScript.
        """
        sha256 = verified(path, published(cls.name))
        net = load_state(path, allow_script=True)
        if not isinstance(net, torch.jit.ScriptModule):
            raise ValueError(
                f"{path} is no TorchScript, it holds {type(net).__name__}: the published amt-s.pth "
                "has no code in it. Export the network from its own project with "
                "torch.jit.trace(net, (first, second)).save(FILE), where net(first, second) gives "
                "the middle frame, and pass that file."
            )
        return cls(net, sha256)

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The frames half-way between.

        Args:
            first: ``[N, 3, H, W]`` in [0, 1].
            second: The same shape and range.
        """
        sides = margins(*first.shape[-2:], MULTIPLE)
        ends = [F.pad(x.float(), sides, mode="replicate") for x in (first, second)]
        return cropped(self.net(*ends), sides)


class MUSIQ(Backbone):
    """MUSIQ trained on SPAQ (Ke et al., arXiv 2108.05997), run by the optional package ``pyiqa``.

    Frames are shown as VBench's mode "longer" does: rounded to 8 bits, shrunk (bilinear, no
    antialiasing, rounded again) so that the longer side has at most 512 pixels.

    Args:
        net: Takes frames ``[N, 3, H, W]`` in [0, 1]; gives scores of about 0 to 100.
        sha256: Checksum of the file that the weights are from.
    """

    name = "musiq-spaq"
    num_features = 1
    comparable = True
    recipe = (
        f"MUSIQ SPAQ (pyiqa), 8 bits, longer side at most {LONGEST} (bilinear, antialias off, "
        "8 bits again), score / 100"
    )

    def __init__(self, net: nn.Module, sha256: str | None = None) -> None:
        super().__init__()
        self.net, self.weights_sha256 = net, sha256
        self.freeze()

    @classmethod
    def load(cls, path: Path | str) -> MUSIQ:
        """The network with weights from a file such as ``musiq_spaq_ckpt-358bb6af.pth``.

        Raises:
            ValueError: The file is not that of this network.
            WeightsUnavailable: The package ``pyiqa`` is missing.
        """
        try:
            from pyiqa.archs.musiq_arch import MUSIQ as Network
        except ImportError as error:
            raise WeightsUnavailable(
                f"The backbone '{cls.name}' cannot be built: the network is in the package pyiqa, "
                f"which cannot be imported ({error}). Install it with `pip install pyiqa`, whose "
                "licence forbids commercial use, or leave the metric out."
            ) from error
        sha256 = verified(path, published(cls.name))
        state = load_state(path)
        net = Network(pretrained=False)
        load_exactly(net, state.get("params", state), path)
        return cls(net, sha256)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Scores of about 0 to 1, ``[N, 1]``.

        Args:
            frames: ``[N, 3, H, W]`` in [0, 1].
        """
        return self.net(shrunk(frames, LONGEST)).reshape(len(frames), 1) / 100


def shrunk(frames: Tensor, longest: int) -> Tensor:
    """Frames in the steps of 8 bits whose longer side has so many pixels at most.

    Args:
        frames: ``[N, 3, H, W]`` in [0, 1].
        longest: In pixels.

    Returns:
        float32 ``[N, 3, h, w]`` in [0, 1].

    Example:
        >>> shrunk(torch.rand(1, 3, 480, 832), 512).shape
        torch.Size([1, 3, 295, 512])
    """
    frames = (frames.float() * 255).round()
    longer = max(frames.shape[-2:])
    if longer > longest:
        size = [int(longest / longer * side) for side in frames.shape[-2:]]
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False).round()
    return frames / 255
