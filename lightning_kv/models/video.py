"""A network with what stands around it: text before, pixels after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_kv.models.wan import CausalWan


class Codec(Protocol):
    """Latents to pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, F, C, h, w]`` to pixels ``[B, F', 3, H, W]`` in [0, 1]."""
        ...

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """The same for one clip ``[F, C, h, w]``, piece by piece ``[n, 3, H, W]``."""
        ...


@runtime_checkable
class EncodingCodec(Codec, Protocol):
    """Latents to pixels and back: what a model needs to go on from a video."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, F', 3, H, W]`` in [0, 1] to latents ``[B, F, C, h, w]``."""
        ...


Encoder = Callable[[list[str]], Tensor]
"""Prompts to text states ``[B, at most text_len, text_dim]``."""


@dataclass
class VideoModel:
    """A network with what is needed to go from a prompt to pixels.

    Args:
        network: The diffusion transformer.
        codec: Latents to pixels; None where only latents are wanted.
        encoder: Prompts to text states.
        source: What its numbers come from: checksums, chosen keys, precision. Part of a run's
            fingerprint.
        name: What it is called in results.
    """

    network: CausalWan
    codec: Codec | None
    encoder: Encoder
    source: dict[str, str] = field(default_factory=dict)
    name: str = "a model"
