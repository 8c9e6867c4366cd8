"""Transformers that look at whole clips: VideoMAE-v2 for the content-debiased distance, and others.

Wang et al., VideoMAE V2 (arXiv 2303.16727); Ge et al., On the Content Bias in Frechet Video
Distance (arXiv 2404.12391).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kv.metrics.backbones.base import Backbone
from lightning_kv.metrics.backbones.i3d import load_exactly, squashed
from lightning_kv.metrics.backbones.vits import IMAGENET
from lightning_kv.metrics.backbones.weights import (
    checksum,
    load_state,
    published,
    verified,
)

GIANT = {
    "image_size": 224,
    "patch_size": 14,
    "num_frames": 16,
    "tubelet_size": 2,
    "hidden_size": 1408,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
}
"""Sizes of the published ViT-g, as the configuration of transformers names them."""

EPS = 1e-6

# Names in the published file, and in transformers; the attention is split below.
NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


class VideoMAE(Backbone):
    """VideoMAE-v2 ViT-g, fine-tuned on Something-Something-v2: the features of cd-FVD.

    The published file is read into the network of transformers, every parameter of it but those of
    the classifier, which is not looked at.

    Args:
        encoder: A ``VideoMAEModel`` of transformers without a layer norm at its end.
        norm: What is done with the mean of its tokens.
        sha256: Checksum of the file that the weights are from.
    """

    name = "videomae-ssv2"
    comparable = True

    def __init__(self, encoder: nn.Module, norm: nn.LayerNorm, sha256: str | None = None) -> None:
        super().__init__()
        self.encoder, self.norm, self.weights_sha256 = encoder, norm, sha256
        self.num_features = norm.normalized_shape[0]
        self.clip_len, self.side = encoder.config.num_frames, encoder.config.image_size
        self.recipe = (
            f"VideoMAE-v2 SSv2 as in cd-FVD, {self.clip_len}f/squash{self.side}-bilinear, range "
            "[0,1] not rounded, no mean and deviation, layer norm of the mean token, float32"
        )
        self.freeze()

    @classmethod
    def load(cls, path: Path | str) -> VideoMAE:
        """The network with weights from ``vit_g_hybrid_pt_1200e_ssv2_ft.pth``.

        Raises:
            ValueError: The file is not that of this network.
        """
        sha256 = verified(path, published(cls.name))
        return cls(*read_published(load_state(path), path), sha256=sha256)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Features, float32 ``[B, 1408]``.

        Args:
            clips: ``[B, 16, 3, H, W]`` in [0, 1], any H and W.

        Raises:
            ValueError: The clips are of another length.
        """
        shown = squashed(clips, self.name, self.clip_len, self.side).transpose(1, 2)
        return self.norm(self.encoder(shown).last_hidden_state.mean(1))


class VideoTransformer(Backbone):
    """Mean token of a VideoMAE or V-JEPA 2 of one's own choice, from a folder of transformers.

    No paper has distances on these features; they serve comparisons within one study. Pass the
    module to a metric.

    Args:
        net: A ``VideoMAEModel`` or ``VJEPA2Model`` of transformers.
        clip_len: Frames of a clip; by default what the network was trained with, at most 16.
        sha256: Checksum of the weights.

    Raises:
        ValueError: The network is another one, or cannot look at clips of this length.
    """

    def __init__(self, net: nn.Module, clip_len: int | None = None, sha256: str | None = None):
        super().__init__()
        config = net.config
        if config.model_type not in ("videomae", "vjepa2"):
            raise ValueError(
                f"A network of the type '{config.model_type}' is not known as a video encoder. "
                "Pass a folder of the type videomae or vjepa2."
            )
        self.net, self.weights_sha256 = net, sha256
        self.fixed = config.model_type == "videomae"
        trained = config.num_frames if self.fixed else min(config.frames_per_clip, 16)
        self.clip_len = clip_len or trained
        if self.clip_len % config.tubelet_size or (self.fixed and self.clip_len != trained):
            raise ValueError(
                f"This {config.model_type} cannot look at clips of {self.clip_len} frames. Pass "
                + (f"{trained}." if self.fixed else f"a multiple of {config.tubelet_size}.")
            )
        self.side = config.image_size if self.fixed else config.crop_size
        self.num_features = config.hidden_size
        self.name = f"transformers-{config.model_type}"
        self.recipe = (
            f"mean token of transformers' {type(net).__name__} ({config.num_hidden_layers} layers "
            f"of {config.hidden_size}) from a local folder, {self.clip_len}f/squash{self.side}-"
            "bilinear, ImageNet statistics, float32; not a recipe of the literature"
        )
        for name, values in zip(("mean", "deviation"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def load(cls, path: Path | str, clip_len: int | None = None) -> VideoTransformer:
        """Read a folder of transformers; the network is never asked.

        Raises:
            ValueError: There is another network in it, or not all of it.
        """
        from transformers import AutoModel

        try:
            net, found = AutoModel.from_pretrained(
                path, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, RuntimeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} cannot be read as a video encoder: {reason} Pass a folder with "
                "config.json and model.safetensors, of the type videomae or vjepa2."
            ) from error
        # What is missing would have been filled with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{path} does not hold all of {type(net).__name__}: {len(missing)} tensors are "
                f"missing, {missing[0]} among them. Copy the whole folder again."
            )
        return cls(net, clip_len, checksum(path))

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Features, float32 ``[B, d]``.

        Args:
            clips: ``[B, T, 3, H, W]`` in [0, 1], any H and W.

        Raises:
            ValueError: The clips are of another length.
        """
        shown = squashed(clips, self.name, self.clip_len, self.side).transpose(1, 2)
        shown = (shown - self.mean) / self.deviation
        if self.fixed:
            return self.net(shown).last_hidden_state.mean(1)
        return self.net(shown, skip_predictor=True).last_hidden_state.mean(1)


def read_published(
    state: dict[str, Any], path: Path | str, sizes: dict[str, int] = GIANT
) -> tuple[nn.Module, nn.LayerNorm]:
    """The network in a file of the VideoMAE-v2 project, fine-tuned with mean pooling.

    Args:
        state: What the file holds: the parameters, or those under ``module`` or ``model``.
        path: Of the file, for errors.
        sizes: As the configuration of transformers names them.

    Returns:
        The encoder of transformers, and the layer norm that its mean token goes through.

    Raises:
        ValueError: A parameter is missing, left over, or of another shape.
    """
    from transformers import VideoMAEConfig, VideoMAEModel

    for key in ("module", "model"):
        state = state.get(key, state)
    config = VideoMAEConfig(
        **sizes, layer_norm_eps=EPS, hidden_act="gelu", qkv_bias=True, use_mean_pooling=True
    )
    encoder, norm = VideoMAEModel(config), nn.LayerNorm(config.hidden_size, eps=EPS)
    body = {name: tensor.float() for name, tensor in state.items() if not name.startswith("head.")}
    pooled = {k.removeprefix("fc_norm."): body.pop(k) for k in list(body) if k[:8] == "fc_norm."}
    load_exactly(norm, pooled, path)
    load_exactly(encoder, _renamed(body, encoder.state_dict()), path)
    return encoder, norm


def _renamed(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names of transformers, the joint attention matrix in three."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        stem, found, rest = name.partition(".attn.")
        stem += ".attention.attention."
        if not found:
            renamed[name] = tensor
        elif rest == "qkv.weight":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{stem}{part}.weight"] = rows
        else:
            # Versions of transformers name the two biases differently.
            part = {"q_bias": "query.bias", "v_bias": "value.bias"}.get(rest, rest)
            renamed[stem + (part if stem + part in wanted else rest)] = tensor
    return renamed
