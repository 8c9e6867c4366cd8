"""A small video encoder for the panorama world: features of frames and of clips of 8 frames."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.utilities.files import checksum

SHIPPED = Path(__file__).parents[2] / "weights" / "panorama_encoder.safetensors"
SCREEN = 32  # pixels: height and width of a frame
CLIP = 8  # frames of a clip
FEATURES = 64
TOKEN = 32  # channels of one of the 4 x 4 tokens of a frame
LAGS = (1, 2)  # frames between two frames whose tokens are matched


class PanoramaNetwork(nn.Module):
    """Convolutions over each frame, then over time.

    The temporal part sees a summary of each frame and how well each token matches the tokens of the
    same row one and two frames earlier: motion is read off these matches, whatever is on screen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *convolution(nn.Conv2d(3, 24, 3, 2, 1, bias=False)),
            *convolution(nn.Conv2d(24, 32, 3, 2, 1, bias=False)),
            *convolution(nn.Conv2d(32, 48, 3, 1, 1, bias=False)),
            *convolution(nn.Conv2d(48, 96, 3, 2, 1, bias=False)),
            nn.Conv2d(96, TOKEN, 1),
        )
        self.place = nn.Linear(16 * TOKEN, FEATURES)
        self.summary = nn.Linear(16 * TOKEN, 96)
        self.motion = nn.Sequential(
            *convolution(nn.Conv1d(96 + 64 * len(LAGS), 96, 3, 1, 1, bias=False)),
            *convolution(nn.Conv1d(96, 96, 3, 1, 1, bias=False)),
        )
        self.clip = nn.Linear(2 * 96, FEATURES)

    def tokens(self, frames: Tensor) -> Tensor:
        """Frames ``[N, 3, 32, 32]`` in [0, 1] to tokens ``[N, 32, 4, 4]``."""
        return self.trunk(2 * frames - 1)

    def frame_features(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, 32, 4, 4]`` to features ``[N, 64]`` of the place that a frame shows."""
        return self.place(tokens.flatten(1))

    def movement(self, tokens: Tensor) -> Tensor:
        """Tokens of clips ``[B, T, 32, 4, 4]`` to what goes on at each frame, ``[B, 96, T]``."""
        unit = F.normalize(tokens, dim=2)
        seen = [self.summary(F.relu(tokens.flatten(2)))]
        for lag in LAGS:
            match = torch.einsum("btcri,btcrj->btrij", unit[:, lag:], unit[:, :-lag])
            seen.append(F.pad(match.flatten(2), (0, 0, lag, 0)))
        return self.motion(torch.cat(seen, dim=2).transpose(1, 2))

    def clip_features(self, movement: Tensor) -> Tensor:
        """What happens around each frame ``[B, 96, T]`` to features of the clip ``[B, 64]``."""
        return self.clip(torch.cat([movement.mean(2), movement.amax(2)], dim=1))


def convolution(layer: nn.Conv1d | nn.Conv2d) -> list[nn.Module]:
    """A convolution with batch normalisation and ReLU."""
    norm = nn.BatchNorm1d if isinstance(layer, nn.Conv1d) else nn.BatchNorm2d
    return [layer, norm(layer.out_channels), nn.ReLU()]


class PanoramaEncoder(Backbone):
    """Features of panorama frames and clips, by weights that ship with the package.

    The cosine of two frames' features estimates the share of the screen that they have in common,
    less where a frame is damaged. Clip features are trained to say which artefacts a clip has, and
    how strong: wrong pictures (blur, noise, flat tiles, colours, columns, cross-fades) and wrong
    motion (stops, jumps, wrong speed, turns away from the walls).

    Args:
        network: With its weights.
        weights_sha256: Checksum of their file; None where there is none.

    Example:
        >>> encoder = PanoramaEncoder.load()
        >>> encoder(torch.rand(3, 3, 32, 32)).shape, encoder(torch.rand(2, 8, 3, 32, 32)).shape
        (torch.Size([3, 64]), torch.Size([2, 64]))
    """

    name = "panorama-encoder"
    num_features = FEATURES
    recipe = (
        "panorama encoder (253 k parameters, trained on panorama worlds and synthetic artefacts), "
        "RGB in [0, 1], 32 x 32 px as they are; clips of 8 frames; for the panorama world only"
    )
    clip_len = CLIP
    takes_frames = True

    def __init__(self, network: PanoramaNetwork, weights_sha256: str | None = None) -> None:
        super().__init__()
        self.network, self.weights_sha256 = network, weights_sha256
        self.freeze()

    @classmethod
    def load(cls, path: Path | None = None) -> PanoramaEncoder:
        """The encoder with the weights of a file; those of the package where none is given.

        Raises:
            ValueError: No such file, or it is cut off, or holds something else.
        """
        path = SHIPPED if path is None else Path(path)
        tensors = _read(path)
        with torch.device("meta"):  # draws no initial weights: the global generator stays as it is
            network = PanoramaNetwork()
        try:
            network.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{path} holds no panorama encoder: {error}. Give a file that "
                "`lightning-kv pretrain-encoder` has written."
            ) from error
        return cls(network, checksum(path))

    @torch.no_grad()
    def forward(self, block: Tensor) -> Tensor:
        """Features ``[., 64]`` of frames ``[N, 3, 32, 32]`` or clips ``[B, 8, 3, 32, 32]``.

        Frames that were enlarged by a whole number, as in video files, are averaged back.

        Raises:
            ValueError: The block has another shape.
        """
        shape = tuple(block.shape)
        side, spare = divmod(shape[-1], SCREEN)
        square = shape[-3:] == (3, shape[-1], shape[-1]) and side and not spare
        if not square or shape[1:-3] not in ((), (CLIP,)) or len(shape) < 4:
            raise ValueError(
                f"The panorama encoder cannot look at a block {shape}. Pass panorama frames "
                f"[N, 3, {SCREEN}, {SCREEN}] or clips [B, {CLIP}, 3, {SCREEN}, {SCREEN}], or a "
                "whole multiple of these sides."
            )
        tokens = self.network.tokens(F.avg_pool2d(block.float().flatten(0, -4), side))
        if len(shape) == 4:
            return self.network.frame_features(tokens)
        return self.network.clip_features(self.network.movement(tokens.unflatten(0, shape[:2])))


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ValueError: No such file, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(
            f"There are no weights of the panorama encoder at {path}. Give an existing file, or "
            "make one: `lightning-kv pretrain-encoder -c configs/pretrain_encoder.yaml`."
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}. It may "
            "be cut off: copy it again, or train it again with `lightning-kv pretrain-encoder`."
        ) from error
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }
