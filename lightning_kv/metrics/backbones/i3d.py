"""I3D on Kinetics-400: the network of the Frechet video distance.

Carreira and Zisserman, Quo Vadis, Action Recognition? (arXiv 1705.07750): Inception-v1 whose
filters reach over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.metrics.backbones.weights import load_state, published, verified

CLASSES = 400
SIDE = 224
SHORTEST = 10  # frames; with fewer the temporal pooling collapses

# The networks were trained by a library whose batch normalisation adds 1e-3, not torch's 1e-5.
EPS = 1e-3

Triple = tuple[int, int, int]

# What comes after what: a convolution (channels, kernel, stride), a pool (kernel, stride), or an
# Inception block (channels of its branches: 1x1, 1x1 -> 3x3, 1x1 -> 3x3, pool -> 1x1).
LAYERS: dict[str, tuple] = {
    "Conv3d_1a_7x7": (64, 7, (2, 2, 2)),
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1": (64, 1, (1, 1, 1)),
    "Conv3d_2c_3x3": (192, 3, (1, 1, 1)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad with zeros so that a window moved by ``stride`` gives ceil(size / stride) results.

    What does not divide evenly goes behind, as TensorFlow's "SAME" has it.

    Args:
        x: ``[B, C, T, H, W]``.
        kernel: Size of the window in T, H, W.
        stride: Its step in T, H, W.

    Example:
        >>> same_padding(torch.zeros(1, 1, 4, 5, 5), (1, 3, 3), (1, 2, 2)).shape
        torch.Size([1, 1, 4, 7, 7])
    """
    sides: list[int] = []
    for size, width, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        sides = [total // 2, total - total // 2, *sides]
    return F.pad(x, sides)


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU; or, for the logits, a convolution with bias."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: Triple = (1, 1, 1), last: bool = False
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, size, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(outputs, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to as many positions as the stride leaves."""
        x = self.conv3d(same_padding(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class Pool(nn.Module):
    """Maximum over a window. Zeros at the border do not matter: all inputs are positive."""

    def __init__(self, size: Triple, stride: Triple) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to as many positions as the stride leaves."""
        return F.max_pool3d(same_padding(x, self.size, self.stride), self.size, self.stride)


class Mixed(nn.Module):
    """An Inception block: four branches side by side."""

    def __init__(self, inputs: int, branches: Sequence[int]) -> None:
        super().__init__()
        one, two_in, two, three_in, three, four = branches
        self.b0 = Unit(inputs, one, 1)
        self.b1a, self.b1b = Unit(inputs, two_in, 1), Unit(two_in, two, 3)
        self.b2a, self.b2b = Unit(inputs, three_in, 1), Unit(three_in, three, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(inputs, four, 1)
        self.outputs = one + two + three + four

    def forward(self, x: Tensor) -> Tensor:
        """Channels of the four branches, one after the other."""
        branches = (
            self.b0(x),
            self.b1b(self.b1a(x)),
            self.b2b(self.b2a(x)),
            self.b3b(self.b3a(x)),
        )
        return torch.cat(branches, 1)


class I3D(nn.Module):
    """Inception-v1 inflated to three dimensions, with the parameter names of the published file.

    Example:
        >>> sum(parameter.numel() for parameter in I3D().parameters())
        12697264
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, facts in LAYERS.items():
            if name.startswith("MaxPool"):
                layer: nn.Module = Pool(*facts)
            elif name.startswith("Mixed"):
                layer = Mixed(channels, facts)
                channels = layer.outputs
            else:
                layer = Unit(channels, *facts)
                channels = facts[0]
            self.add_module(name, layer)
        self.logits = Unit(channels, CLASSES, 1, last=True)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits, averaged over time, before any softmax.

        Args:
            clips: ``[B, 3, T, 224, 224]`` in [-1, 1], T at least 10.

        Returns:
            ``[B, 400]``.
        """
        x = clips
        for name in LAYERS:
            x = self.get_submodule(name)(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean((2, 3, 4))


class I3DBackbone(Backbone):
    """Logits of I3D for clips of 16 frames: the features of the Frechet video distance.

    Ports of this network that read the same file with torch's batch normalisation (1e-5 under the
    root instead of 1e-3) give slightly other features.

    Args:
        net: The network.
        clip_len: Frames of a clip, at least 10; the literature has 16.
        sha256: Checksum of the file that the weights are from.

    Raises:
        ValueError: The clips are too short.
    """

    name = "i3d"
    num_features = CLASSES
    comparable = True

    def __init__(self, net: nn.Module, clip_len: int = 16, sha256: str | None = None) -> None:
        super().__init__()
        if clip_len < SHORTEST:
            raise ValueError(
                f"I3D cannot look at clips of {clip_len} frames: its pooling over time leaves "
                f"nothing. Pass at least {SHORTEST}; the literature has 16."
            )
        self.net, self.clip_len, self.weights_sha256 = net, clip_len, sha256
        self.recipe = f"i3d-k400/{clip_len}f/squash{SIDE}-bilinear"
        self.freeze()

    @classmethod
    def load(cls, path: Path | str) -> I3DBackbone:
        """The network with weights from a file such as ``i3d_pretrained_400.pt``.

        Raises:
            ValueError: The file is not that of this network.
        """
        sha256 = verified(path, published(cls.name))
        net = I3D()
        load_exactly(net, load_state(path), path)
        return cls(net, sha256=sha256)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Logits, float32 ``[B, 400]``.

        Args:
            clips: ``[B, T, 3, H, W]`` in [0, 1], any H and W.

        Raises:
            ValueError: The clips are of another length.
        """
        return self.net(self.prepared(clips))

    def prepared(self, clips: Tensor) -> Tensor:
        """Clips squashed to 224 x 224 and moved to [-1, 1], float32 ``[B, 3, T, 224, 224]``.

        Raises:
            ValueError: The clips are of another length.
        """
        return 2 * squashed(clips, self.name, self.clip_len, SIDE) - 1


class I3DScriptBackbone(I3DBackbone):
    """The same features from the TorchScript file that StyleGAN-V uses.

    Loading that file runs the code in it, so it is taken by this name only. It is asked neither to
    rescale nor to resize: frames are prepared as for :class:`I3DBackbone`.
    """

    name = "i3d-torchscript"

    @classmethod
    def load(cls, path: Path | str) -> I3DScriptBackbone:
        """The network of a file such as ``i3d_torchscript.pt``; runs the code in it.

        Raises:
            ValueError: The file is not TorchScript.
        """
        sha256 = verified(path, published(cls.name))
        net = load_state(path, allow_script=True)
        if not isinstance(net, torch.jit.ScriptModule):
            raise ValueError(
                f"{path} is no TorchScript, it holds {type(net).__name__}. Pass "
                f"{published(cls.name).file}, or read plain weights with the backbone 'i3d'."
            )
        return cls(net, sha256=sha256)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Logits, float32 ``[B, 400]``.

        Args:
            clips: ``[B, T, 3, H, W]`` in [0, 1], any H and W.

        Raises:
            ValueError: The clips are of another length.
        """
        # Unoptimised, because the fusers of recent versions of torch break on this file.
        with torch.jit.optimized_execution(False):
            found = self.net(
                self.prepared(clips), rescale=False, resize=False, return_features=True
            )
        # A single clip may come back without its batch axis.
        return found.float().reshape(len(clips), self.num_features)


def squashed(clips: Tensor, name: str, clip_len: int, side: int) -> Tensor:
    """Clips with time behind the channels, squashed to a square (bilinear, no antialiasing).

    Args:
        clips: ``[B, T, 3, H, W]``.
        name: Who asks, for the error.
        clip_len: The T that there must be.
        side: Of the square, in pixels.

    Returns:
        float32 ``[B, 3, T, side, side]``.

    Raises:
        ValueError: The clips have another shape.
    """
    if clips.ndim != 5 or clips.shape[1:3] != (clip_len, 3):
        raise ValueError(
            f"The backbone '{name}' cannot look at clips of the shape {tuple(clips.shape)}. "
            f"Pass [clips, {clip_len}, 3, height, width]."
        )
    frames = F.interpolate(
        clips.flatten(0, 1).float(),
        size=(side, side),
        mode="bilinear",
        align_corners=False,
        antialias=False,
    )
    return frames.unflatten(0, clips.shape[:2]).transpose(1, 2)


def load_exactly(net: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Load parameters into a network that has exactly these.

    Raises:
        ValueError: One is missing, left over, or of another shape.
    """
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(
            f"{path} does not fit {type(net).__name__}: {reason} "
            "Pass the file as it was published, with every parameter."
        ) from error
