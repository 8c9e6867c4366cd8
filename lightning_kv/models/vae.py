"""Pixels of Wan models: the causal video VAE, decoded frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_kv.models.text import wan_extra
from lightning_kv.utilities.files import checksum

LIBRARY = "AutoencoderKLWan"


class WanVAE(nn.Module):
    """Latents to pixels and back, with bounded memory at any length.

    Args:
        vae: A diffusers ``AutoencoderKLWan``. Its device and number format are kept.
        fingerprint: Identity of its weights: the sha256 of their file.

    Raises:
        ValueError: The VAE is of a kind that cannot be decoded frame by frame here.
    """

    def __init__(self, vae: Any, fingerprint: str = "") -> None:
        super().__init__()
        _check_config(vae.config)
        self.vae, self.fingerprint = vae, fingerprint

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype) -> WanVAE:
        """Load from local files; nothing is downloaded.

        Args:
            folder: The ``vae/`` folder of a Wan repository in diffusers format.
            device: Where to put it.
            dtype: Of the weights and of all computation inside.

        Raises:
            ValueError: diffusers is not installed, or files are missing, damaged or of another VAE.
        """
        library = getattr(wan_extra("diffusers"), LIBRARY)
        _check_folder(Path(folder))
        try:
            vae, found = library.from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The VAE in {folder} cannot be loaded: {error}. Copy the folder again."
            ) from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"The VAE in {folder} lacks {len(missing)} tensors, such as {missing[0]}. "
                "Copy the folder again."
            )
        mark = checksum(*sorted(Path(folder).glob("*.safetensors")))
        return cls(vae.to(device).eval().requires_grad_(False), mark)

    @property
    def stride(self) -> tuple[int, int]:
        """Pixel frames per latent frame (after the first), and pixels per latent side."""
        config = self.vae.config
        return 2 ** sum(config.temperal_downsample), 2 ** (len(config.dim_mult) - 1)

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames that so many latent frames decode to."""
        return 1 + self.stride[0] * (frames - 1) if frames else 0

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, F, C, h, w]`` to pixels ``[B, T, 3, H, W]`` in [0, 1], float32, on the CPU.

        Raises:
            ValueError: The latents have another shape.
        """
        if latents.dim() != 5 or not latents.shape[1]:
            raise ValueError(
                f"Latents of shape {tuple(latents.shape)} cannot be decoded. Give [batch, frames, "
                "channels, height, width] with one frame or more."
            )
        clips, frames, _, height, width = latents.shape
        side = self.stride[1]
        shape = (clips, self.pixel_frames(frames), 3, side * height, side * width)
        pixels = torch.empty(shape)
        for clip, target in zip(latents, pixels, strict=True):
            start = 0
            for part in self.stream(clip):
                target[start : start + len(part)] = part
                start += len(part)
        return pixels

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode ``[F, C, h, w]`` one latent frame at a time: yields ``[n, 3, H, W]``."""
        decoder = self.open()
        return (decoder.push(latents[i : i + 1]) for i in range(len(latents)))

    def open(self) -> VideoDecoder:
        """Start decoding one clip whose latents come in parts."""
        return VideoDecoder(self)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, T, 3, H, W]`` in [0, 1] to latents ``[B, F, C, h, w]``, float32.

        The most likely latents are taken, not drawn.

        Args:
            pixels: T is 1 more than a multiple of the temporal stride.

        Raises:
            ValueError: Frames or sides do not fit the strides.
        """
        time, side = self.stride
        sizes = pixels.shape
        if len(sizes) != 5 or sizes[1] % time != 1 or sizes[3] % side or sizes[4] % side:
            raise ValueError(
                f"Pixels of shape {tuple(sizes)} cannot be encoded. Give [batch, frames, 3, "
                f"height, width] with 1, {1 + time}, {1 + 2 * time}, ... frames and sides that "
                f"are multiples of {side}."
            )
        return torch.stack([self._encode(clip) for clip in pixels])

    def _encode(self, pixels: Tensor) -> Tensor:
        signed = (pixels.movedim(1, 0) * 2 - 1).to(self.vae.device, self.vae.dtype)
        found = self.vae.encode(signed[None]).latent_dist.mode()[0]
        mean, std = self._moments()
        return ((found.float() - mean) / std).movedim(0, 1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel ``[C, 1, 1, 1]``, in float32 whatever the weights are."""
        config, device = self.vae.config, self.vae.device
        return tuple(
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )


class VideoDecoder:
    """One clip while it is decoded; latents may come in parts of any size.

    Each causal convolution keeps its last two inputs, so parts join without a seam, and what is
    held does not grow with the clip. Pixels are those of decoding the whole clip at once up to
    rounding (float32: 5e-6; bfloat16: 0.04), and the same ones whatever the size of the parts.

    Args:
        codec: The VAE.
    """

    def __init__(self, codec: WanVAE) -> None:
        self.codec = codec
        kind = type(codec.vae.decoder.conv_in)
        self.features: list[Any] = [
            None for module in codec.vae.decoder.modules() if isinstance(module, kind)
        ]
        self.frames = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the features that are kept between parts."""
        held = [item for item in self.features if isinstance(item, Tensor)]
        return sum(item.untyped_storage().nbytes() for item in held)

    def push(self, latents: Tensor) -> Tensor:
        """Decode the next latents ``[F, C, h, w]`` to ``[n, 3, H, W]`` in [0, 1] on the CPU.

        The first latent frame of the clip gives 1 pixel frame, each later one the temporal stride.

        Raises:
            ValueError: No frame, or another number of channels.
        """
        channels = self.codec.vae.config.z_dim
        if latents.dim() != 4 or not len(latents) or latents.shape[1] != channels:
            raise ValueError(
                f"Latents of shape {tuple(latents.shape)} cannot be decoded. "
                f"Give [frames, {channels}, height, width] with one frame or more."
            )
        return torch.cat([self._frame(latent) for latent in latents])

    @torch.no_grad()
    def _frame(self, latent: Tensor) -> Tensor:
        vae = self.codec.vae
        mean, std = self.codec._moments()
        normal = latent[:, None].to(vae.device, torch.float32)  # [C, 1, h, w]
        hidden = vae.post_quant_conv((normal * std + mean).to(vae.dtype)[None])
        pixels = vae.decoder(
            hidden, feat_cache=self.features, feat_idx=[0], first_chunk=self.frames == 0
        )
        self.frames += 1
        return pixels[0].clamp(-1, 1).float().mul(0.5).add(0.5).movedim(0, 1).cpu()


def _check_folder(folder: Path) -> None:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name != LIBRARY:
        found = f"its config.json is of {name}" if name else "it has no readable config.json"
        raise ValueError(
            f"There is no Wan VAE in {folder}: {found}. Give the vae/ folder of a Wan2.1 "
            f"repository in diffusers format, whose config.json says {LIBRARY}."
        )


def _check_config(config: Any) -> None:
    reasons = [
        reason
        for applies, reason in (
            (config.is_residual, "is_residual=True (Wan2.2 5B)"),
            (config.patch_size is not None, f"patch_size={config.patch_size}"),
            (
                sum(config.temperal_downsample) != 2,
                f"temperal_downsample={list(config.temperal_downsample)}",
            ),
        )
        if applies
    ]
    if reasons:
        raise ValueError(
            "This VAE cannot be decoded frame by frame here. Its config has "
            f"{', '.join(reasons)}. Use the VAE of Wan2.1, which takes 4 pixel frames per latent "
            "frame, has no patches and no residual shortcuts."
        )
