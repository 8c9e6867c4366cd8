"""Small text encoder and VAE of the embedded model: look-ups and a linear patch code."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn


class PatchCodec(nn.Module):
    """A linear VAE: each 8 x 8 RGB patch is projected on fixed principal components.

    Args:
        mean: ``[192]`` mean patch, values in [0, 1].
        basis: ``[192, C]`` orthonormal components.
        scale: ``[C]`` divides the coefficients, so that latents have a standard deviation near 1.
    """

    patch = 8

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("basis", basis), ("scale", scale)):
            self.register_buffer(name, value.float())

    @classmethod
    def fit(cls, patches: Tensor, channels: int) -> PatchCodec:
        """Fit by principal components, each divided by the root of its spread (half whitening).

        Args:
            patches: ``[N, 3, 8, 8]`` samples in [0, 1].
            channels: Number C of latent channels.
        """
        flat = patches.flatten(1).double()
        mean = flat.mean(0)
        _, _, components = torch.linalg.svd(flat - mean, full_matrices=False)
        basis = components[:channels].T
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        scale = ((flat - mean) @ basis).std(0).clamp_min(1e-6).sqrt()
        scale = scale * (((flat - mean) @ basis) / scale).std()
        return cls(mean, basis, scale)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels ``[..., 3, H, W]`` in [0, 1] to latents ``[..., C, H/8, W/8]``."""
        size = self.patch
        tiles = pixels.unfold(-2, size, size).unfold(-2, size, size)  # [..., 3, h, w, 8, 8]
        tiles = tiles.movedim(-5, -3).flatten(-3)
        return (((tiles - self.mean) @ self.basis) / self.scale).movedim(-1, -3)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[..., C, h, w]`` to pixels ``[..., 3, 8 h, 8 w]``, clamped to [0, 1]."""
        size = self.patch
        tiles = (latents.movedim(-3, -1) * self.scale) @ self.basis.T + self.mean
        tiles = tiles.unflatten(-1, (3, size, size))  # [..., h, w, 3, 8, 8]
        tiles = tiles.movedim(-3, -5).transpose(-3, -2)  # [..., 3, h, 8, w, 8]
        return tiles.flatten(-4, -3).flatten(-2).clamp(0, 1)

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode one clip ``[F, C, h, w]`` frame by frame, ``[1, 3, 8 h, 8 w]`` each."""
        return (self.decode(frame) for frame in latents.split(1))


class PhraseEncoder(nn.Module):
    """Text states by look-up: a word, or a pair of neighbouring words, has one vector.

    Args:
        phrases: Words and word pairs, in the order of ``states``.
        states: ``[len(phrases), text_dim]``.
    """

    def __init__(self, phrases: list[str], states: Tensor) -> None:
        super().__init__()
        self.phrases = {phrase: index for index, phrase in enumerate(phrases)}
        self.register_buffer("states", states.float())

    def forward(self, prompts: list[str]) -> Tensor:
        """Encode prompts of equal length to ``[B, words, text_dim]``.

        Raises:
            ValueError: A word is not in the vocabulary, or the prompts differ in length.
        """
        rows = [self._rows(prompt) for prompt in prompts]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"Prompts of different length in one batch: {prompts}. "
                "This text encoder has no padding: give prompts of the same number of words."
            )
        return self.states[torch.tensor(rows, device=self.states.device)]

    def _rows(self, prompt: str) -> list[int]:
        words = prompt.split()
        unknown = [word for word in words if word not in self.phrases]
        if unknown or not words:
            known = ", ".join(phrase for phrase in self.phrases if " " not in phrase)
            raise ValueError(
                f"The text encoder does not know {unknown} in {prompt!r}. It knows: {known}."
            )
        pairs = [""] + [f"{left} {right}" for left, right in pairwise(words)]
        return [
            self.phrases[p if p in self.phrases else w] for p, w in zip(pairs, words, strict=True)
        ]
