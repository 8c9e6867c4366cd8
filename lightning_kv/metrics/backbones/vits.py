"""Image transformers that look at frames: DINO, DINOv2 and CLIP, in the format of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.metrics.backbones.weights import (
    UNREADABLE,
    WeightsUnavailable,
    published,
    verified,
)
from lightning_kv.utilities.errors import first_line

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation of the channels, in [0, 1], that a network was trained with."""


class Transformer(Backbone):
    """A frame backbone whose weights are a folder of transformers, of one published size.

    A subclass says what was published and how frames are prepared.

    Args:
        model: The network; :meth:`load` reads it from a folder.
        folder: Where it came from.

    Attributes:
        kind: ``model_type`` in the folder's ``config.json``.
        published_size: Width, layers and patch size of what bears this name.
        side: Shorter side in pixels that frames are brought to.
        mode: How frames are interpolated.
        crop: Whether the centre is cut out as a square.
        stats: Mean and deviation of the channels.
        options: What transformers needs to know to build it.
    """

    kind: str
    published_size: tuple[int, int, int]
    side: int = 224
    mode: str = "bilinear"
    crop: bool = False
    stats: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        super().__init__()
        self.model = model
        self.folder = folder
        for name, values in zip(("mean", "deviation"), self.stats, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def load(cls, path: Path | None) -> Transformer:
        """Read the network from a folder; every one of its weights must be there.

        Raises:
            ValueError: The folder holds another network, or not all of it.
        """
        if path is None:
            raise ValueError(f"{cls.name} needs a folder, and none was given. Pass its path.")
        found = cls(_read(cls, path), path)
        found.weights_sha256 = verified(path, published(cls.name))
        return found

    @staticmethod
    def network() -> type[Any]:
        """The class of transformers that reads the folder."""
        raise NotImplementedError

    def prepared(self, frames: Tensor) -> Tensor:
        """Frames as the network takes them; see :func:`resized`."""
        frames = resized(frames, self.side, self.mode)
        if self.crop:
            frames = centred(frames, self.side)
        return (frames / 255 - self.mean) / self.deviation


class DINO(Transformer):
    """DINO ViT-B/16 (Caron et al., arXiv 2104.14294) as VBench's subject consistency uses it.

    The class token after the last layer norm. Frames are not cut, and the position embeddings are
    interpolated to their shape; the rest of a side that fills no patch is not seen.
    """

    name = "dino-vitb16"
    kind = "vit"
    published_size = (768, 12, 16)
    options = MappingProxyType({"add_pooling_layer": False})
    comparable = True
    recipe = (
        "DINO ViT-B/16 class token, float32; 8-bit frames, shorter side 224, bilinear, no "
        "antialias, no crop, ImageNet statistics, position embeddings interpolated"
    )

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        super().__init__(model, folder)
        self.num_features = model.config.hidden_size
        # transformers interpolates to the number of patches, the authors by a ratio.
        model.embeddings.interpolate_pos_encoding = self._positions

    @staticmethod
    def network() -> type[Any]:
        """The class of transformers that reads the folder."""
        from transformers import ViTModel

        return ViTModel

    def forward(self, frames: Tensor) -> Tensor:
        """Features ``[N, 768]`` of frames ``[N, 3, H, W]`` in [0, 1]."""
        found = self.model(self.prepared(frames), interpolate_pos_encoding=True)
        return found.last_hidden_state[:, 0]

    def _positions(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        patch = self.published_size[2]
        table = self.model.embeddings.position_embeddings
        return interpolated(table, height // patch, width // patch)


class DINOv2(DINO):
    """DINOv2 ViT-B/14 (Oquab et al., arXiv 2304.07193), class token, frames as for DINO."""

    name = "dinov2-vitb14"
    kind = "dinov2"
    published_size = (768, 12, 14)
    options = MappingProxyType({})
    comparable = False
    recipe = DINO.recipe.replace("DINO ViT-B/16", "DINOv2 ViT-B/14")

    @staticmethod
    def network() -> type[Any]:
        """The class of transformers that reads the folder."""
        from transformers import Dinov2Model

        return Dinov2Model

    def forward(self, frames: Tensor) -> Tensor:
        """Features ``[N, 768]`` of frames ``[N, 3, H, W]`` in [0, 1]."""
        return self.model(self.prepared(frames)).last_hidden_state[:, 0]


class CLIPB32(Transformer):
    """CLIP ViT-B/32 (Radford et al., arXiv 2103.00020): image and text in one space.

    Frames are brought to a shorter side of 224 and cut to the square in the middle.
    """

    name = "clip-vit-b32"
    kind = "clip"
    published_size = (768, 12, 32)
    comparable = True
    mode = "bicubic"
    crop = True
    stats = OPENAI
    recipe = (
        "CLIP ViT-B/32 image embedding, float32; 8-bit frames, shorter side 224, bicubic, no "
        "antialias, centre crop, CLIP statistics"
    )

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        super().__init__(model, folder)
        self.num_features = model.config.projection_dim

    @staticmethod
    def network() -> type[Any]:
        """The class of transformers that reads the folder."""
        from transformers import CLIPModel

        return CLIPModel

    def forward(self, frames: Tensor) -> Tensor:
        """Features ``[N, d]`` of frames ``[N, 3, H, W]`` in [0, 1]."""
        found = self.model.vision_model(pixel_values=self.prepared(frames)).pooler_output
        return self.model.visual_projection(found)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Features ``[N, d]`` of texts, each cut after 77 tokens."""
        tokens = self._tokenizer()(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.mean.device)
        found = self.model.text_model(**tokens).pooler_output
        return self.model.text_projection(found)

    def _tokenizer(self) -> Any:
        """The tokenizer of the folder.

        Raises:
            WeightsUnavailable: The folder has none.
        """
        from transformers import CLIPTokenizer

        wanted = self.model.config.text_config.vocab_size
        try:
            found = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
            known = len(found)
        except (OSError, TypeError, ValueError):
            known = 0
        if known != wanted:  # transformers may make one without a vocabulary of a bare folder
            raise WeightsUnavailable(
                f"'{self.name}' cannot read the prompt: the tokenizer in {self.folder} knows "
                f"{known} of {wanted} tokens. Put tokenizer.json, or vocab.json and merges.txt, "
                f"beside the weights: `lightning-kv fetch {self.name}` brings them."
            )
        return found


class CLIPL14(CLIPB32):
    """CLIP ViT-L/14, whose image embeddings the LAION aesthetic predictor reads."""

    name = "clip-vit-l14"
    published_size = (1024, 24, 14)
    recipe = CLIPB32.recipe.replace("ViT-B/32", "ViT-L/14")


def resized(frames: Tensor, side: int, mode: str) -> Tensor:
    """Frames brought to a shorter side, in the steps of 8 bits, without antialiasing.

    As torchvision's ``Resize(side, antialias=False)`` does to 8-bit frames, which is what VBench
    gives it: rounded before and after.

    Args:
        frames: ``[N, 3, H, W]`` in [0, 1].
        side: Shorter side, in pixels.
        mode: ``bilinear`` or ``bicubic``.

    Returns:
        ``[N, 3, h, w]``, whole numbers from 0 to 255.

    Example:
        >>> resized(torch.rand(1, 3, 48, 83), 24, "bilinear").shape
        torch.Size([1, 3, 24, 41])
    """
    whole = (frames * 255).round()
    shape = frames.shape[-2:]
    size = [int(side * length / min(shape)) for length in shape]
    if list(shape) == size:
        return whole
    found = F.interpolate(whole, size, mode=mode, align_corners=False, antialias=False)
    return found.clamp(0, 255).round()


def centred(frames: Tensor, side: int) -> Tensor:
    """The square in the middle of frames, half a pixel rounded to even.

    Args:
        frames: ``[N, 3, H, W]``, H and W at least ``side``.
        side: Of the square, in pixels.
    """
    top, left = (round((length - side) / 2) for length in frames.shape[-2:])
    return frames[..., top : top + side, left : left + side]


def interpolated(table: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings of another grid, as the authors of DINO interpolate them.

    They do it by a ratio with a tenth of a patch added, which moves every position a little;
    interpolating to the size gives other features.

    Args:
        table: ``[1, 1 + G * G, d]``: of the class token, then of the square grid trained on.
        rows: Of the grid wanted, in patches.
        columns: Of the grid wanted, in patches.

    Returns:
        ``[1, 1 + rows * columns, d]``.

    Example:
        >>> interpolated(torch.zeros(1, 1 + 4, 8), 2, 3).shape
        torch.Size([1, 7, 8])
    """
    grid = round((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (grid, grid):
        return table
    places = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    ratio = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    found = F.interpolate(places, scale_factor=ratio, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], found.flatten(2).transpose(1, 2)], dim=1)


def _read(kind: type[Transformer], folder: Path) -> nn.Module:
    """The network in a folder, in float32.

    Raises:
        ValueError: It is another network, not all of it is there, or it cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        _check_size(kind, folder, config)
        model, found = kind.network().from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **kind.options,
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{folder} cannot be read as '{kind.name}': {first_line(error)}. Repeat the download: "
            f"`lightning-kv fetch {kind.name}`, or copy the whole folder of "
            f"{published(kind.name).page}."
        ) from error
    missing = sorted(found["missing_keys"])  # would have been filled with random numbers
    if missing:
        raise ValueError(
            f"{folder} does not hold all of '{kind.name}': {len(missing)} tensors are missing, "
            f"{missing[0]} among them. Copy the whole folder of {published(kind.name).page}."
        )
    return model


def _check_size(kind: type[Transformer], folder: Path, config: Any) -> None:
    vision = getattr(config, "vision_config", config)
    names = ("hidden_size", "num_hidden_layers", "patch_size")
    size = tuple(getattr(vision, name, None) for name in names)
    if config.model_type != kind.kind or size != kind.published_size:
        raise ValueError(
            f"{folder} is not '{kind.name}': it holds a '{config.model_type}' with (width, layers, "
            f"patch) {size}; '{kind.name}' is a '{kind.kind}' with {kind.published_size}. Pass its "
            "folder, or build the other network and pass the module under its own name."
        )
